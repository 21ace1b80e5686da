"""Last resort on a GPU: the definition in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.moe_combine import reference
from quantlab_kernels.moe_combine.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def config(problem: Problem) -> None:
    return None


def launch(problem: Problem, y: Tensor, positions: Tensor, weights: Tensor, out: Tensor, config: None) -> None:
    """Fill `out` by `reference`."""
    out.copy_(reference.combine(y, positions, weights, torch.float32))
