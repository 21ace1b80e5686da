"""The definition, and the CPU implementation: the same formula in the operands' own dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` of the first R channels of x [B, H, S, D]; the others pass through.

    cos, sin  [B or 1, S, R];  rotate_half of (a, b), the halves of R channels, is (-b, a) (Su et al., arXiv 2104.09864,
    in the arrangement of GPT-NeoX). Computed in `dtype`; None computes in x's, which rounds both products and the sum.
    """
    if dtype is not None:
        x, cos, sin = x.to(dtype), cos.to(dtype), sin.to(dtype)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    rotated = turned * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
    return torch.cat((rotated, rest), dim=-1)
