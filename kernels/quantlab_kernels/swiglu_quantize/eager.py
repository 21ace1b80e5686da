"""Last resort on a GPU: the definition in plain torch, several passes over the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from quantlab_kernels.swiglu_quantize import reference

if TYPE_CHECKING:
    from quantlab_kernels.swiglu_quantize.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def config(problem: Problem) -> None:
    return None


def launch(problem: Problem, gate_up: Tensor, codes: Tensor, scale: Tensor, config: None) -> None:
    """Fill `codes` and `scale` by `reference`."""
    result = reference.swiglu(gate_up, problem.group)
    codes.copy_(result[0])
    scale.copy_(result[1])
