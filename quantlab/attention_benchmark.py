"""The error of 8-bit attention on the inputs by which kernels are compared: part of ``quantlab bench attention``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantlab_kernels.attention_prefill import errors


def cases(only: str = "") -> list[str]:
    """The inputs whose name contains `only`."""
    return [name for name in errors.distributions(errors.TOKENS, errors.LENGTHS, "cuda") if only in name]


def dry_run() -> None:
    """Take the error over a few tokens of each, on the CPU."""
    for _ in errors.report("cpu", tokens=64, lengths=(128,)):
        pass


def run(only: str = "") -> Iterator[tuple[Any, ...]]:
    """(inputs, formats of the operands, "", "", "", "", the error) of each of the `cases`, on this GPU."""
    for error in errors.report(only=only):
        yield error.inputs, error.operands, *4 * [""], f"RMSE {error.rms:.2e}, {error.relative:.2%}"
