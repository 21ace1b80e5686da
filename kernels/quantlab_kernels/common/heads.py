"""A batched product over heads whose result lies as the next layer reads it: [M, H, N] without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.ops import define, require


def bmm_heads(x: Tensor, matrix: Tensor) -> Tensor:
    """``out[m, h] = x[m, h] @ matrix[h]``: x [M, H, K], any strides, matrix [H, K, N] to [M, H, N], contiguous.

    `torch.bmm` writes [H, M, N]; only with a place to write it lets the heads of a token lie together, which a compiler
    takes apart again.
    """
    return _OP(x, matrix)


def _fake(x: Tensor, matrix: Tensor) -> Tensor:
    require(
        x.dim() == 3 and matrix.dim() == 3 and x.shape[1:] == matrix.shape[:2] and x.dtype == matrix.dtype,
        lambda: f"bmm_heads: x {tuple(x.shape)}, matrix {tuple(matrix.shape)}; needs [M, H, K] and [H, K, N]",
    )
    return x.new_empty((x.shape[0], x.shape[1], matrix.shape[2]))


def _bmm(x: Tensor, matrix: Tensor) -> Tensor:
    out = _fake(x, matrix)
    torch.bmm(x.detach().transpose(0, 1), matrix.detach(), out=out.transpose(0, 1))  # as all ops, without a gradient
    return out


_OP = define("bmm_heads(Tensor x, Tensor matrix) -> Tensor", fake=_fake, cpu=_bmm, cuda=_bmm)
