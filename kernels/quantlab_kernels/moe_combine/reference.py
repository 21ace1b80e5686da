"""The definition, and the CPU implementation (in float32)."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(y: Tensor, positions: Tensor, weights: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """[T, K]: for each token the sum over its choices of weight times row, in `dtype`; -1 is no row."""
    there = positions >= 0
    rows = y[positions.clamp_min(0).long()].to(dtype)
    return torch.where(there[..., None], rows * weights.to(dtype)[..., None], 0).sum(1)
