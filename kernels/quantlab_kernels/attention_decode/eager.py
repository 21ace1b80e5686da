"""Last resort on a GPU: the definition in plain torch, which dequantizes the whole cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.attention_decode import reference
from quantlab_kernels.attention_decode.reference import Attributes
from quantlab_kernels.common.kv import PackedKV

if TYPE_CHECKING:
    from quantlab_kernels.attention_decode.op import Problem


def supports(problem: Problem) -> str | None:
    return None


def launch(
    problem: Problem, q: Tensor, cache: PackedKV, length: Tensor, start: Tensor | None, table: Tensor | None,
    attributes: Attributes, sinks: Tensor | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill out [B, Sq, Hq, D] and lse [B, Hq, Sq] by `reference`."""
    dense = cache if table is None else reference.gathered(cache, table)
    result, sums, _ = reference.attend(q, dense, length, start, attributes, sinks, torch.float32)
    out.copy_(result)
    lse.copy_(sums)
