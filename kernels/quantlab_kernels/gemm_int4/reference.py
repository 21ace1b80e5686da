"""The definition in float64, and the float32 version of it that CPUs run."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.int4 import decode


def gemm(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """``x @ (b_scale * b).T + bias`` [M, N], computed and returned in `dtype` (float64 or float32)."""
    out = x.to(dtype) @ decode(b, b_scale, dtype).t()
    return out if bias is None else out + bias.to(dtype)
