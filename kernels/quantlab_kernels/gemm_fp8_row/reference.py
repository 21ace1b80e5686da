"""The definition in float64, and the float32 version of it that CPUs run."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.formats import E4M3
from quantlab_kernels.qtensor import QuantizedTensor, TensorSpec

A_SPEC = TensorSpec(E4M3, (1, -1), dynamic=True)
B_SPEC = TensorSpec(E4M3, (1, -1))


def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``dequantize(a) @ dequantize(b).T + bias`` [M, N], computed and returned in `dtype` (float64 or float32)."""
    a_values = QuantizedTensor(a, a_scale, A_SPEC).dequantize(dtype)
    b_values = QuantizedTensor(b, b_scale, B_SPEC).dequantize(dtype)
    out = a_values @ b_values.t()
    return out if bias is None else out + bias.to(dtype)
