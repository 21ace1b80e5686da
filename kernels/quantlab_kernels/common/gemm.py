"""What the GEMM rooms share: the problem as a value, and the layout of activation scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class GemmProblem:
    """``out[M, N] = a[M, K] @ b[N, K].T``: the key of dispatch and of tuning tables.

    m, n, k    extents: tokens, output features, input features
    out_dtype  of the result
    bias       dtype of the bias [N] that is added, or None
    sm         compute capability of the GPU, 90 for 9.0
    """

    m: int
    n: int
    k: int
    out_dtype: torch.dtype = torch.bfloat16
    bias: torch.dtype | None = None
    sm: int = 90

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def bytes(self, scale_bytes: int) -> int:
        """Least traffic of an FP8 GEMM: both operands of one byte, their scales, the result; each moved once."""
        result = self.m * self.n * self.out_dtype.itemsize
        return self.m * self.k + self.n * self.k + scale_bytes + result

    def __str__(self) -> str:
        dtype = str(self.out_dtype).removeprefix("torch.")
        return f"M={self.m} N={self.n} K={self.k} {dtype}{' + bias' if self.bias else ''} on sm_{self.sm}"


def round_up(extent: int, multiple: int) -> int:
    return (extent + multiple - 1) // multiple * multiple


def empty_group_scale(like: Tensor, m: int, groups: int) -> Tensor:
    """Uninitialised activation scales [M, G] in the column-major, padded layout: float32, strides (1, round_up(M, 4)).

    A column of M scales starts on a 16-byte boundary, which is what a TMA load and cuBLASLt ask for.
    """
    padded = round_up(m, 4)
    scale = like.new_empty_strided((padded, groups), (1, padded), dtype=torch.float32)
    return scale[:m] if m != padded else scale


def is_group_scale(scale: Tensor) -> bool:
    """Whether `scale` [M, G] has the layout of `empty_group_scale`."""
    m, groups = scale.shape
    return (m == 1 or scale.stride(0) == 1) and (groups == 1 or scale.stride(1) == round_up(m, 4))


def as_group_scale(scale: Tensor) -> Tensor:
    """`scale` [M, G] in the layout of `empty_group_scale`; a copy only when it has another one."""
    if is_group_scale(scale):
        return scale
    return empty_group_scale(scale, *scale.shape).copy_(scale)
