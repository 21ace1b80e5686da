"""What the GEMM rooms share: the problem as a value, the layout of activation scales, the op itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.hardware import device_of
from quantlab_kernels.common.ops import define, require

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


def empty_group_scale(like: Tensor, m: int, groups: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised scales [M, G] in the column-major, padded layout: strides (1, `padded_rows`).

    A column of M scales starts on a 16-byte boundary, which is what a TMA load and cuBLASLt ask for.
    """
    padded = padded_rows(m, dtype)
    scale = like.new_empty_strided((padded, groups), (1, padded), dtype=dtype)
    return scale[:m] if m != padded else scale


def padded_rows(m: int, dtype: torch.dtype = torch.float32) -> int:
    """Distance of two columns of m scales: m rounded up to 16 bytes, four float32 or eight 16-bit numbers."""
    return round_up(m, 16 // dtype.itemsize)


def is_group_scale(scale: Tensor) -> bool:
    """Whether `scale` [M, G] has the layout of `empty_group_scale`."""
    m, groups = scale.shape
    return (m == 1 or scale.stride(0) == 1) and (groups == 1 or scale.stride(1) == padded_rows(m, scale.dtype))


def as_group_scale(scale: Tensor) -> Tensor:
    """`scale` [M, G] in the layout of `empty_group_scale`; a copy only when it has another one."""
    if is_group_scale(scale):
        return scale
    m, groups = scale.shape
    return empty_group_scale(scale, m, groups, scale.dtype).copy_(scale)


def check_operands(
    op: str, blocks: tuple[tuple[int, int], tuple[int, int]], a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Refuse what no backend of a GEMM room takes. Shapes may be symbolic.

    blocks  of the scales of a and of b, as in `TensorSpec.block`; a last extent of -1 is one scale per row
    Raises RuntimeError that names the op, what was given and what is needed.
    """
    fp8 = torch.float8_e4m3fn
    require(a.dtype == fp8 and b.dtype == fp8, lambda: f"{op}: a is {a.dtype}, b is {b.dtype}, needs {fp8}")
    require(
        a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[1],
        lambda: f"{op}: a {tuple(a.shape)} and b {tuple(b.shape)} do not match, needs [M, K] and [N, K]",
    )
    _check_scale(f"{op}: a_scale", a, a_scale, blocks[0])
    _check_scale(f"{op}: b_scale", b, b_scale, blocks[1])
    if bias is not None:
        require(
            bias.dtype.is_floating_point and tuple(bias.shape) == (b.shape[0],),
            lambda: f"{op}: bias is {bias.dtype} {tuple(bias.shape)}, needs floats of shape {(b.shape[0],)}",
        )
    require(out_dtype in OUT_DTYPES, lambda: f"{op}: out_dtype {out_dtype}, needs one of {OUT_DTYPES}")


def _check_scale(name: str, codes: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    rows = (codes.shape[0] + block[0] - 1) // block[0]
    columns = 1 if block[1] == -1 else (codes.shape[1] + block[1] - 1) // block[1]
    require(
        scale.dtype == torch.float32 and tuple(scale.shape) == (rows, columns),
        lambda: f"{name} is {scale.dtype} {tuple(scale.shape)}, needs float32 {(rows, columns)}",
    )


def define_gemm(
    name: str,
    *,
    check: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], int],
    reference: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor],
    launch: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], None],
) -> Any:
    """Register ``quantlab::name(a, a_scale, b, b_scale, bias, out_dtype)``, a [M, K], and return the operator.

    check      refuses what no backend takes, and returns N
    reference  the result [M, N] computed in the dtype that is its last argument
    launch     selects a backend and writes the result to its last argument [M, N]; M, N and K are not 0
    """

    def fake(
        a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return a.new_empty((a.shape[0], check(a, a_scale, b, b_scale, bias, out_dtype)), dtype=out_dtype)

    def cpu(
        a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        check(a, a_scale, b, b_scale, bias, out_dtype)
        return reference(a, a_scale, b, b_scale, bias, torch.float32).to(out_dtype)

    def cuda(
        a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        out = fake(a, a_scale, b, b_scale, bias, out_dtype)
        if out.numel() == 0:
            return out
        if a.shape[1] == 0:
            return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        with device_of(a):
            launch(a, a_scale, b, b_scale, bias, out)
        return out

    schema = "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, ScalarType out_dtype) -> Tensor"
    return define(name + schema, fake=fake, cpu=cpu, cuda=cuda)
