"""Last resort on a GPU: the definition in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from quantlab_kernels.attention_quantize import reference
from quantlab_kernels.attention_quantize.reference import Rotary

if TYPE_CHECKING:
    from quantlab_kernels.attention_quantize.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def launch(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, out: tuple[Tensor, ...], rotary: Rotary | None = None
) -> None:
    """Fill the eight outputs by `reference`."""
    made = reference.quantize(q, k, v, key_range, out[0].dtype, out[5].dtype, rotary)
    for target, value in zip(out, made, strict=True):
        target.copy_(value)
