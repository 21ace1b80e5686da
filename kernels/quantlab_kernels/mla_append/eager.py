"""Last resort on a GPU: the definition in plain torch. It waits for the GPU, and cannot be captured in a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantlab_kernels.mla_append import op

if TYPE_CHECKING:
    from quantlab_kernels.mla_append.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def launch(problem: Problem, *arguments: object) -> None:
    """Write codes and scales by `reference`."""
    op._cpu(*arguments)  # type: ignore[arg-type]


def launch_step(problem: Problem, *arguments: Any) -> None:
    """As `launch`, and turned queries into the last argument."""
    *given, out = arguments
    out.copy_(op._step_cpu(*given))


def launch_turn(problem: Problem, *arguments: Any) -> None:
    """Turn queries and keys by `reference`."""
    op._turn_cpu(*arguments)
