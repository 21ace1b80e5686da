"""Last resort on a GPU: the definition in plain torch, which dequantizes the whole cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.mla_decode import reference

if TYPE_CHECKING:
    from quantlab_kernels.mla_decode.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def launch(
    problem: Problem, q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor, start: Tensor | None,
    table: Tensor | None, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill out [B, Sq, H, L] and lse [B, H, Sq] by `reference`."""
    dense = cache if table is None else reference.gathered(cache, table)
    result, sums, _ = reference.attend(q_latent, q_rope, dense, length, start, scale, torch.float32)
    out.copy_(result)
    lse.copy_(sums)
