"""Tensors on a GPU that outlive the call which needs them first: flags, counters, constant matrices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def lasting(make: Callable[[], Tensor]) -> Tensor:
    """The tensor that `make` returns, finished, in memory that no CUDA graph owns.

    Inductor warms its graphs up with a pool which takes whatever their thread allocates, and refuses to go on if some
    of it is still alive afterwards. So `make` runs on another thread, and on that one's stream.
    """

    def finished() -> Tensor:
        tensor = make()
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return tensor

    with ThreadPoolExecutor(1) as other:
        return other.submit(finished).result()


def lasting_zeros(count: int, device: int) -> Tensor:
    """[count] int32 zeros on a GPU."""
    return lasting(lambda: torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}"))
