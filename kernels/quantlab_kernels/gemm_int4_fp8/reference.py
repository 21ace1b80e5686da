"""The definition in float64, and the float32 version of it that CPUs run."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.int4 import decode


def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``(a_scale * a) @ (b_scale * b).T + bias`` [M, N], computed and returned in `dtype` (float64 or float32)."""
    groups = a_scale.shape[1]
    wide = (a.to(dtype).unflatten(1, (groups, -1)) * a_scale.to(dtype)[:, :, None]).flatten(1)
    out = wide @ decode(b, b_scale, dtype).t()
    return out if bias is None else out + bias.to(dtype)
