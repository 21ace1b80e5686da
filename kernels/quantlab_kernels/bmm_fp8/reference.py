"""The definition in float64, and the float32 version of it that CPUs run."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.formats import E4M3
from quantlab_kernels.qtensor import QuantizedTensor, TensorSpec

SPEC = TensorSpec(E4M3, (128, 128))


def slices(w: Tensor, w_scale: Tensor, heads: int, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """[H, count, C]: of every head the rows of the dequantized projection from `first` on."""
    rows = QuantizedTensor(w, w_scale, SPEC).dequantize(dtype).unflatten(0, (heads, -1))
    return rows[:, first : first + count]


def bmm(
    a: Tensor, w: Tensor, w_scale: Tensor, first: int, count: int, transposed: bool, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[M, H, C], or [M, H, count] if transposed: computed and returned in `dtype` (float64 or float32)."""
    weight = slices(w, w_scale, a.shape[1], first, count, dtype)
    weight = weight.transpose(1, 2) if transposed else weight
    return (a.to(dtype).transpose(0, 1) @ weight).transpose(0, 1).contiguous()
