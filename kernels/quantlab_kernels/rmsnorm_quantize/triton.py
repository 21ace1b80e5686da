"""One pass: a program keeps its whole row in registers, from the sum of squares to the codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.triton_fp8 import divide, largest_magnitude, scale_of, store_codes
from quantlab_kernels.common.triton_launch import Launcher, begin

if TYPE_CHECKING:
    from quantlab_kernels.rmsnorm_quantize.op import Problem

LONGEST_ROW = 16384  # columns; 16 warps hold 32 values a thread


@dataclass(frozen=True)
class Config:
    """columns: the row's length rounded up to a power of two; num_warps share it."""

    columns: int
    num_warps: int


def supports(problem: Problem) -> str | None:
    """Everything from sm_80 on, rows that fit into registers."""
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if problem.k > LONGEST_ROW:
        return f"K = {problem.k} does not fit into the registers of one program, at most {LONGEST_ROW}"
    return None


@remembered
def config(problem: Problem) -> Config:
    """32 values a thread where there are rows enough to fill the chip; 8 for few rows, whose latency counts."""
    columns = max(128, triton.next_power_of_2(problem.k))
    per_thread = 8 if problem.m <= 256 else 32
    return Config(columns, min(16, max(1, columns // (32 * per_thread))))


def launch(
    problem: Problem, x: Tensor, weight: Tensor, eps: float, offset: float,
    out: Tensor, codes: Tensor, scale: Tensor, config: Config,
) -> None:  # fmt: skip
    """Fill out [M, K], codes [M, K] and scale [M, ceil(K/128)] or [M, 1]; x may have any strides."""
    native = problem.sm >= 89
    tensors = x, weight, out, codes if native else codes.view(torch.uint8), scale
    numbers = problem.k, *x.stride(), *scale.stride(), eps, offset
    span = 128 if problem.group else config.columns
    _LAUNCH((problem.m,), tensors, numbers, (config.columns, span, native), config.num_warps)


def launch_plain(problem: Problem, x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Fill out [M, K] of x [A, B, K], A B = M, any strides; rows of a few channels share a program."""
    columns = max(16, triton.next_power_of_2(problem.k))
    rows = max(1, min((2048 if problem.m > 1024 else 256) // columns, triton.next_power_of_2(problem.m)))
    per_thread = 8 if problem.m <= 256 else 16
    warps = min(16, max(1, rows * columns // (32 * per_thread)))
    numbers = problem.m, x.shape[1], problem.k, *x.stride(), eps, offset
    _PLAIN((triton.cdiv(problem.m, rows),), (x, weight, out), numbers, (rows, columns), warps)


@triton.jit
def _plain_kernel(
    x_ptr, weight_ptr, out_ptr, m, inner, k, x_outer, x_inner, x_column, eps, offset, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS rows of COLUMNS columns."""
    begin(EARLY)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < m) & (column < k)
    at = row // inner * x_outer + row % inner * x_inner
    x = tl.load(x_ptr + at + column.to(tl.int64) * x_column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < k, other=0.0).to(tl.float32)
    root = tl.math.sqrt_rn(tl.sum(x * x, 1) / k + eps)
    factor = tl.math.div_rn(tl.full(root.shape, 1.0, tl.float32), root)[:, None]
    out = (x * factor * (weight + offset)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * k + column, out, mask=mask)


@triton.jit
def _kernel(
    x_ptr, weight_ptr, out_ptr, codes_ptr, scale_ptr, k, x_row, x_column, scale_row, scale_column, eps, offset,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A row of COLUMNS columns, of which every SPAN share a scale."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = column < k
    x = tl.load(x_ptr + row * x_row + column.to(tl.int64) * x_column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    # Correctly rounded square root and division: `rsqrt` is off by a unit now and then, on every element of a row.
    factor = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.sum(x * x) / k + eps))
    rounded = (x * factor * (weight + offset)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * k + column, rounded, mask=mask)
    out = tl.where(mask, rounded.to(tl.float32), 0.0)
    grouped = tl.reshape(out, (COLUMNS // SPAN, SPAN))
    scale = scale_of(largest_magnitude(grouped, 1, NATIVE), False)
    SHORT: tl.constexpr = NATIVE and out_ptr.dtype.element_ty.primitive_bitwidth == 16
    quotient = divide(grouped, scale[:, None], False, SHORT)
    store_codes(codes_ptr + row * k + column, tl.reshape(quotient, (COLUMNS,)), mask, NATIVE)
    group = tl.arange(0, COLUMNS // SPAN)
    tl.store(scale_ptr + row * scale_row + group.to(tl.int64) * scale_column, scale, mask=group * SPAN < k)


_LAUNCH = Launcher(_kernel, early=True)
_PLAIN = Launcher(_plain_kernel, early=True)
