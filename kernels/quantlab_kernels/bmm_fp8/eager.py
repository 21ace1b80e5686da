"""Last resort on a GPU: dequantize the weight to float32 and multiply there."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.bmm_fp8 import reference
from quantlab_kernels.bmm_fp8.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def config(problem: Problem) -> None:
    return None


def launch(problem: Problem, a: Tensor, w: Tensor, w_scale: Tensor, out: Tensor, config: None) -> None:
    """Fill out [M, H, N], any float dtype."""
    p = problem
    out.copy_(reference.bmm(a, w, w_scale, p.first, p.count, p.transposed, torch.float32))
