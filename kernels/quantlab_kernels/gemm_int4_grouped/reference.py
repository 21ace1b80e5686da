"""The definition in float64, and the float32 version of it that CPUs run."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.gemm_int4 import reference as wide
from quantlab_kernels.gemm_int4_fp8 import reference as fp8


def gemm(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[S, N] in `dtype`: rows of a by their expert's weight; zeros behind the last expert's rows."""
    out = torch.zeros(a.shape[0], b_scale.shape[1], dtype=dtype, device=a.device)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        if count and a_scale is None:
            out[rows] = wide.gemm(a[rows], b[expert], b_scale[expert], None, dtype)
        elif count and a_scale is not None:
            out[rows] = fp8.gemm(a[rows], a_scale[rows], b[expert], b_scale[expert], None, dtype)
        start += count
    return out
