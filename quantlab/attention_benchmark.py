"""The error of 8-bit attention on the inputs by which kernels are compared: part of ``quantlab bench attention``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantlab_kernels.attention_prefill import errors


def cases() -> list[str]:
    """The inputs, by the names that `run` gives them."""
    return [name for name, _ in errors.distributions(errors.TOKENS, errors.LENGTHS, "meta")]


def dry_run() -> list[str]:
    """The inputs, out of a run over a few tokens on the CPU."""
    return list(dict.fromkeys(error.inputs for error in errors.report("cpu", tokens=64, lengths=(128,))))


def run() -> Iterator[tuple[Any, ...]]:
    """(inputs, formats of the operands, "", "", "", "", the error) of each, on this GPU."""
    for error in errors.report():
        yield error.inputs, error.operands, *4 * [""], f"RMSE {error.rms:.2e}, {error.relative:.2%}"
