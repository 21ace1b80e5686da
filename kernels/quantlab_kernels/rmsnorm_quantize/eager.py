"""Last resort on a GPU: the definition in plain torch, several passes over the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.rmsnorm_quantize import reference

if TYPE_CHECKING:
    from quantlab_kernels.rmsnorm_quantize.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def config(problem: Problem) -> None:
    return None


def launch(
    problem: Problem, x: Tensor, weight: Tensor, eps: float, offset: float,
    out: Tensor, codes: Tensor, scale: Tensor, config: None,
) -> None:  # fmt: skip
    """Fill the three outputs by `reference`."""
    for target, value in zip(
        (out, codes, scale), reference.rmsnorm(x, weight, eps, offset, problem.group), strict=True
    ):
        target.copy_(value)


def launch_plain(problem: Problem, x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Fill `out` by `reference`."""
    out.copy_(reference.norm(x, weight, eps, offset, torch.float32).view(out.shape))
