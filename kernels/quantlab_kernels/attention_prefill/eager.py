"""Last resort on a GPU: the definition in plain torch, a head at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.attention_prefill import reference
from quantlab_kernels.attention_prefill.reference import Attributes
from quantlab_kernels.attention_quantize.op import Quantized

if TYPE_CHECKING:
    from quantlab_kernels.attention_prefill.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def launch(
    problem: Problem, operands: Quantized, attributes: Attributes, sinks: Tensor | None, key_range: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill out [B, Sq, Hq, D] and lse [B, Hq, Sq] by `reference`."""
    low, high = reference.visible(
        problem.sq, problem.skv, attributes.left, attributes.right, key_range, cu_seqlens_q, cu_seqlens_k
    )
    low, high = low.to(out.device), high.to(out.device)
    made = reference.attend(operands, attributes, low, high, sinks, torch.float32)
    out.copy_(made[0])
    lse.copy_(made[1])
