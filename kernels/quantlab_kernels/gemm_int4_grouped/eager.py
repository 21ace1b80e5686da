"""Last resort on a GPU: dequantize and multiply expert by expert in float32, which waits for the counts."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.int4 import Int4Problem
from quantlab_kernels.gemm_int4_grouped import reference


def supports(problem: Int4Problem) -> str | None:
    return None


def config(problem: Int4Problem) -> None:
    return None


def launch(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor, config: None
) -> None:
    """out [S, N], any float dtype."""
    out.copy_(reference.gemm(a, a_scale, b, b_scale, counts, torch.float32))
