"""The definition in float64, and the float32 version of it that CPUs run."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.gemm_fp8_block import reference as block
from quantlab_kernels.gemm_fp8_row import reference as row


def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[S, N] in `dtype`: rows of a by their expert's weight; zeros behind the last expert's rows."""
    one = row.gemm if row_wise(a_scale, b, b_scale) else block.gemm
    out = torch.zeros(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        if count:
            out[rows] = one(a[rows], a_scale[rows], b[expert], b_scale[expert], None, dtype)
        start += count
    return out


def row_wise(a_scale: Tensor, b: Tensor, b_scale: Tensor) -> bool:
    """Whether the scales are one per row of a and of b, and not those of blocks."""
    return a_scale.shape[1] == 1 and tuple(b_scale.shape[1:]) == (b.shape[1], 1)
