"""Last resort on a GPU: the definition in plain torch, a launch for each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from quantlab_kernels.rope import reference

if TYPE_CHECKING:
    from quantlab_kernels.rope.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def config(problem: Problem) -> None:
    return None


def launch(
    problem: Problem, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, config: None
) -> None:
    """Fill both outputs by `reference`."""
    q_out.copy_(reference.rotate(q, cos, sin))
    k_out.copy_(reference.rotate(k, cos, sin))
