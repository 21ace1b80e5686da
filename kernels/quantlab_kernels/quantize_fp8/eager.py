"""Last resort on a GPU: the definition in plain torch, several passes over the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from quantlab_kernels.quantize_fp8 import reference

if TYPE_CHECKING:
    from quantlab_kernels.quantize_fp8.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def config(problem: Problem) -> None:
    return None


def launch(problem: Problem, x: Tensor, given: Tensor | None, codes: Tensor, scale: Tensor, config: None) -> None:
    """Fill `codes` and `scale` by `reference`."""
    if problem.granularity == "token":
        result = reference.token(x)
    else:
        result = getattr(reference, problem.granularity)(x, given, problem.power2)
    codes.copy_(result[0])
    scale.copy_(result[1])
