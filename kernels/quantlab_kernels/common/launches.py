"""What launches of Hopper kernels share: operands that the copy engine can read, weights that are settled, flags."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from quantlab_kernels.common.lasting import lasting_zeros


def aligned(operand: Tensor) -> Tensor:
    """The operand, or a copy of it where the copy engine can read it: from a multiple of 16 bytes."""
    if operand.data_ptr() % 16 == 0:
        return operand
    return torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype, device=operand.device).copy_(
        operand
    )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def settled(weight: Tensor) -> bool:
    """Whether an earlier launch has read this tensor as it is now, so that the kernel just before cannot be writing it.

    Then its loads may start while that kernel still runs, which hides most of a small problem's latency.
    """
    if weight.is_inference():  # these do not count their versions
        return False
    read = id(weight), weight._version  # the identity too: a deep copy takes attributes along
    if getattr(weight, "_quantlab_read", None) == read:
        return True
    weight._quantlab_read = read  # type: ignore[attr-defined]
    return False


# Flags of hand-over, zeros which a launch leaves as zeros. Launches of one stream cannot overlap and share theirs. A
# captured launch may be replayed beside anything, so it takes its own out of a pool, for good; a graph's own memory
# would do as well, but has to be cleared by one more node.
_POOL = 1 << 20
_STREAM_FLAGS: dict[tuple[int, int], Tensor] = {}
_CAPTURE_FLAGS: dict[int, Tensor] = {}
_TAKING = threading.Lock()  # threads may capture at the same time


def handover_flags(device: int, count: int) -> Tensor:
    """At least `count` zeros for one launch on the current stream."""
    if torch.cuda.is_current_stream_capturing():
        with _TAKING:
            pool = _CAPTURE_FLAGS.get(device)
            if pool is not None and pool.numel() >= count:
                _CAPTURE_FLAGS[device] = pool[count:]
                return pool[:count]
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")
    if device not in _CAPTURE_FLAGS:
        _CAPTURE_FLAGS[device] = lasting_zeros(_POOL, device)
    key = device, torch._C._cuda_getCurrentRawStream(device)
    flags = _STREAM_FLAGS.get(key)
    if flags is None or flags.numel() < count:
        flags = _STREAM_FLAGS[key] = lasting_zeros(max(count, 1024), device)
    return flags
