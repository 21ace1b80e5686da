"""The definition, and the CPU implementation (in float32)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.quantize_fp8 import reference


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` [M, K], computed in `dtype`."""
    x = x.to(dtype)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * (offset + weight.to(dtype))


def rmsnorm(x: Tensor, weight: Tensor, eps: float, offset: float, group: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in x's dtype, rounded once from float32, and codes and scale of that rounded result."""
    out = norm(x, weight, eps, offset, torch.float32).to(x.dtype)
    return out, *(reference.group(out, None, False) if group else reference.token(out))
