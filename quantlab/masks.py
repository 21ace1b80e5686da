"""Attention masks as our kernels take them: limits, ranges of keys, packed sequences; dense only where it must be.

transformers describes a mask by a function of indices and lets each attention implementation make of it what it can.
`create` reads that function's structure. Where it is an interval of keys around each query (causal, sliding windows,
padding at the ends, packed sequences) it returns the padding mask [B, keys] with a `Visible` attached, which costs
nothing at any length; everything else becomes the mask [B, 1, queries, keys] that SDPA takes. Recognised is what
transformers' own constructors make; any other function counts as unknown, so that a mask is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_ATTACHED = "_quantlab_visible"


@dataclass(frozen=True)
class Limits:
    """A query at place p sees keys p - left .. p + right, -1 is no limit; `sequence` [B, S]: only those of its own."""

    left: int = -1
    right: int = -1
    sequence: Tensor | None = None

    def __and__(self, other: Limits) -> Limits | None:
        if self.sequence is not None and other.sequence is not None:
            return None
        sequence = self.sequence if other.sequence is None else other.sequence
        return Limits(_tighter(self.left, other.left), _tighter(self.right, other.right), sequence)


def _tighter(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


@dataclass(frozen=True)
class Visible:
    """Which keys each query of a call sees, as `quantlab_kernels.attention_prefill` takes it.

    keys        the first so many keys of the buffer exist; the last query stands at the last of them
    left, right limits around a query, -1 is none
    key_range   [B, 2] int32: only keys start .. end - 1 are real; None for all
    cu_seqlens  [n + 1] int32 of packed sequences; None for one sequence
    build       the dense mask, made when it is asked for and then kept
    """

    keys: int
    left: int
    right: int
    key_range: Tensor | None = None
    cu_seqlens: Tensor | None = None
    build: Callable[[], Tensor | None] = field(default=lambda: None, repr=False)

    @cached_property
    def dense(self) -> Tensor | None:
        return self.build()


def visible_of(mask: Tensor | None) -> Visible | None:
    """What `create` attached to a mask."""
    return getattr(mask, _ATTACHED, None)


def create(**given: Any) -> Tensor | None:
    """A mask function of transformers' `AttentionMaskInterface`; called with the arguments of `sdpa_mask`."""
    from transformers.masking_utils import sdpa_mask

    if torch.compiler.is_compiling():
        return None if _plain_causal(given) else sdpa_mask(**given)
    if given["q_length"] == 1:
        return sdpa_mask(**given)
    # A static cache hands out its own count of tokens, which moves on before the dense mask is asked for.
    given["q_offset"] = int(given.get("q_offset", 0))
    visible = describe(given, lambda: sdpa_mask(**{**given, "allow_is_causal_skip": False}))
    if visible is None or _said_by_none(visible, given):
        return sdpa_mask(**given)
    # Of all keys from the first on: `generate` makes masks for static caches, and the model reads this one as padding.
    keys = int(given.get("kv_offset", 0)) + visible.keys
    carrier = _padding({**given, "kv_offset": 0}, keys)
    if carrier is None:
        carrier = torch.ones(given["batch_size"], keys, dtype=torch.bool, device=given["device"])
    else:
        carrier = carrier.clone()  # the attribute belongs to this mask, not to the user's
    setattr(carrier, _ATTACHED, visible)
    return carrier


def _plain_causal(given: dict[str, Any]) -> bool:
    """Whether "causal, square, no padding" is all there is; that much can be told while a graph is traced."""
    from transformers.masking_utils import causal_mask_function

    offset = given.get("q_offset", 0)
    return (
        given.get("mask_function") is causal_mask_function
        and given.get("attention_mask") is None
        and given.get("allow_is_causal_skip", True)
        and isinstance(offset, int)
        and offset == 0
        and given["q_length"] == given["kv_length"]
    )


def _said_by_none(visible: Visible, given: dict[str, Any]) -> bool:
    """Whether transformers says it by no mask at all: its own rule decides, and gives None where it can."""
    whole = visible.key_range is None and visible.cu_seqlens is None and visible.left < 0
    return whole and (visible.right < 0 or visible.keys == given["q_length"])


def describe(given: dict[str, Any], build: Callable[[], Tensor | None]) -> Visible | None:
    """The mask as intervals, or None where it is more than that. Waits for the GPU where there is padding."""
    limits = limits_of(given.get("mask_function"))
    queries, keys = given["q_length"], given["kv_length"]
    end = int(given.get("q_offset", 0)) - int(given.get("kv_offset", 0)) + queries
    if limits is None or not 0 < end <= keys:
        return None
    if limits.right == 0:
        keys = end  # what lies behind the last query is the empty part of a static cache
    elif (limits.left >= 0 or limits.right >= 0) and end != keys:
        return None
    cu_seqlens = None
    if limits.sequence is not None:
        if limits.sequence.shape != (1, queries) or queries != keys or _padding(given, keys) is not None:
            return None
        cu_seqlens = boundaries(limits.sequence[0])
    padding = _padding(given, keys)
    key_range = None
    if padding is not None:
        key_range, contiguous, whole = ranges(padding)
        if not contiguous:
            return None
        key_range = None if whole else key_range
    return Visible(keys, limits.left, limits.right, key_range, cu_seqlens, build)


def _padding(given: dict[str, Any], keys: int) -> Tensor | None:
    """[B, keys] bool, or None where no key is padding by definition."""
    mask, offset = given.get("attention_mask"), int(given.get("kv_offset", 0))
    if mask is None:
        return None
    missing = keys + offset - mask.shape[-1]
    mask = torch.nn.functional.pad(mask, (0, missing)) if missing > 0 else mask
    return mask[:, offset : offset + keys].bool()


def leading_padding(mask: Tensor, tokens: int) -> Tensor:
    """[B]: how many of a sequence's first tokens are padding, which does not even see itself, by the mask of the call
    that brings them: [B, keys], or [B, heads, tokens, keys], bool or additive. Does not wait for the GPU."""
    shown = seen(mask)
    own = shown[:, :tokens] if mask.ndim == 2 else shown[:, 0].diagonal(dim1=1, dim2=2)
    return (~own).int().cumprod(1).sum(1)


def seen(mask: Tensor) -> Tensor:
    """A mask, bool or additive, as bool: True is seen."""
    return mask == 0 if mask.is_floating_point() else mask.bool()


def ranges(padding: Tensor) -> tuple[Tensor, bool, bool]:
    """([B, 2] int32 start and end of the True run of each row, whether every row has one run, whether all is True)."""
    length = padding.shape[1]
    place = torch.arange(length, device=padding.device)
    start = torch.where(padding, place, length).amin(1)
    end = torch.where(padding, place + 1, 0).amax(1)
    count = padding.sum(1)
    contiguous = ((end - start == count) | (count == 0)).all()
    one_run, whole = torch.stack([contiguous, (count == length).all()]).tolist()
    empty = count == 0
    bounds = torch.stack([start.masked_fill(empty, 0), end.masked_fill(empty, 0)], 1)
    return bounds.to(torch.int32), one_run, whole


def boundaries(sequence: Tensor) -> Tensor:
    """[n + 1] int32: where each run of equal numbers begins, and the length of all."""
    change = torch.nonzero(sequence[1:] != sequence[:-1]).flatten() + 1
    ends = [change.new_zeros(1), change, change.new_full((1,), sequence.numel())]
    return torch.cat(ends).to(torch.int32)


def limits_of(function: Any) -> Limits | None:
    """The limits that a mask function of transformers imposes, None for one that is not known."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return Limits(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return Limits()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    seen = _captured(function)
    match function.__qualname__.partition(".")[0]:
        case "and_masks":
            return _all_of(seen["mask_functions"])
        case "sliding_window_overlay":
            return Limits(left=seen["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay":
            return Limits(left=seen["sliding_window"], right=seen["sliding_window"])
        case "packed_sequence_mask_function":
            return Limits(sequence=seen["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":  # places within a sequence: distances are what they were
            return limits_of(seen["mask_function"])
    return None


def _captured(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _all_of(functions: tuple[Any, ...]) -> Limits | None:
    limits: Limits | None = Limits()
    for function in functions:
        other = limits_of(function)
        if limits is None or other is None:
            return None
        limits = limits & other
    return limits
