"""Last resort on a GPU: the definition in plain torch."""

from __future__ import annotations

from torch import Tensor

from quantlab_kernels.moe_route import reference
from quantlab_kernels.moe_route.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def launch(
    problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, weights: Tensor, index: Tensor
) -> None:
    """Fill logits, weights and index by `reference`."""
    logits.copy_(reference.logits_of(x, weight, logits.dtype == x.dtype))
    found = reference.choose(logits, bias, problem.rule)
    weights.copy_(found[0])
    index.copy_(found[1])
