"""Last resort on a GPU: the definition in plain torch, which waits for the GPU."""

from __future__ import annotations

from torch import Tensor

from quantlab_kernels.moe_dispatch import reference
from quantlab_kernels.moe_dispatch.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def config(problem: Problem) -> None:
    return None


def launch(
    problem: Problem, x: Tensor, top_k_index: Tensor, codes: Tensor, scale: Tensor, positions: Tensor, counts: Tensor,
    config: None,
) -> None:  # fmt: skip
    """Fill codes, scale, positions and counts by `reference`."""
    found = reference.route(top_k_index, problem.experts)
    positions.copy_(found[0])
    counts.copy_(found[1])
    reference.scatter(*reference.quantize(x, problem.group), positions, (codes, scale))
