"""Test data that make a wrong kernel fail, by name. Zero-mean noise alone hides missing promotion and lost rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _normal(x: Tensor) -> Tensor:
    return x


def _positive(x: Tensor) -> Tensor:
    """One-signed sums: truncation in a short accumulator becomes a bias of up to a quarter of the result."""
    return x.abs() + 0.5


def _rows(x: Tensor) -> Tensor:
    """Magnitudes from 1e-4 to 1: a small row that is wrong does not show in a norm."""
    return x * torch.logspace(-4, 0, x.shape[0], device=x.device)[:, None]


def _outliers(x: Tensor) -> Tensor:
    """One element in a thousand a hundred times larger, as in the activations of language models."""
    chosen = torch.arange(x.numel(), device=x.device).view(x.shape) * 2654435761 % 1000 == 0
    return torch.where(chosen, 100 * x, x)


def _zeros(x: Tensor) -> Tensor:
    """Whole rows, whole groups and single elements of zeros."""
    x = x.clone()
    x[::3] = 0
    x[:, 128:256] = 0
    x[1::3, ::2] = 0
    return x


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": _normal, "positive": _positive, "rows": _rows, "outliers": _outliers, "zeros": _zeros,
}  # fmt: skip


def operand(kind: str, rows: int, columns: int, *, seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """A float32 matrix [rows, columns] of a kind of `KINDS`; the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    return KINDS[kind](torch.randn(rows, columns, generator=generator, device=device))
