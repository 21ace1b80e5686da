"""One pass over x: every element is read once, its code and the scale of its group are written once.

Each program takes a tile of whole groups, so the absolute maximum needs no second pass and no atomics. Division by the
scale rounds correctly; a multiplication by the reciprocal would now and then give the neighbouring code. Only rows too
long for registers (more than `configs.LONGEST_ROW` columns, per token) are read twice, the second time from L2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.triton_fp8 import divide, largest_magnitude, scale_of, store_codes
from quantlab_kernels.common.triton_launch import Launcher, begin
from quantlab_kernels.quantize_fp8.configs import Config, choose

if TYPE_CHECKING:
    from quantlab_kernels.quantize_fp8.op import Problem


def supports(problem: Problem) -> str | None:
    """Everything from sm_80 on."""
    return None if problem.sm >= 80 else f"needs sm_80 or newer, the GPU is sm_{problem.sm}"


@remembered
def config(problem: Problem) -> Config:
    return choose(problem)


def launch(problem: Problem, x: Tensor, given: Tensor | None, codes: Tensor, scale: Tensor, config: Config) -> None:
    """Fill codes [M, K] and scale; x may have any strides, `given` is None or broadcasts to the groups."""
    native = problem.sm >= 89
    codes = codes if native else codes.view(torch.uint8)
    m, k = problem.m, problem.k
    if problem.granularity == "token":
        grid = (-(-m // config.rows),)
        tile = config.rows, config.columns, k > config.columns, native
        _TOKEN(grid, (x, codes, scale), (m, k, *x.stride()), tile, config.num_warps)
        return
    given = scale if given is None else given.expand(scale.shape)
    grid = (-(-m // config.rows) * -(-k // config.columns),)
    kernel = _GROUP if problem.granularity == "group" else _BLOCK
    numbers = m, k, *x.stride(), *given.stride(), *scale.stride()
    constants = problem.given, problem.power2, config.rows, config.columns // 128, native
    kernel(grid, (x, given, codes, scale), numbers, constants, config.num_warps)


@triton.jit
def _group_kernel(
    x_ptr, given_ptr, codes_ptr, scale_ptr, m, k, x_row, x_column, given_row, given_column, scale_row, scale_column,
    GIVEN: tl.constexpr, POWER2: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS rows of GROUPS groups of 128 columns; one scale per row and group."""
    begin(EARLY)
    column_tiles = tl.cdiv(k, 128 * GROUPS)
    row = (tl.program_id(0) // column_tiles) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % column_tiles) * GROUPS
    column = first * 128 + tl.arange(0, GROUPS * 128)
    group = first + tl.arange(0, GROUPS)
    wide_row, wide_column = row.to(tl.int64), column.to(tl.int64)
    mask = (row[:, None] < m) & (column[None, :] < k)
    at = x_ptr + wide_row[:, None] * x_row + wide_column[None, :] * x_column
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x = tl.reshape(x, (ROWS, GROUPS, 128))
    scale_mask = (row[:, None] < m) & (group[None, :] * 128 < k)
    if GIVEN:
        scale = tl.load(
            given_ptr + row[:, None] * given_row + group[None, :] * given_column, mask=scale_mask, other=1.0
        )
    else:
        scale = scale_of(largest_magnitude(x, 2, NATIVE), POWER2)
    # A given scale may be anything, so it takes the full division.
    SHORT: tl.constexpr = NATIVE and not GIVEN and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    quotient = divide(x, scale[:, :, None], POWER2 and not GIVEN, SHORT)
    quotient = tl.reshape(quotient, (ROWS, GROUPS * 128))
    store_codes(codes_ptr + wide_row[:, None] * k + column[None, :], quotient, mask, NATIVE)
    tl.store(scale_ptr + row[:, None] * scale_row + group[None, :].to(tl.int64) * scale_column, scale, mask=scale_mask)


@triton.jit
def _block_kernel(
    x_ptr, given_ptr, codes_ptr, scale_ptr, m, k, x_row, x_column, given_row, given_column, scale_row, scale_column,
    GIVEN: tl.constexpr, POWER2: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One block of 128x128 with one scale; ROWS is 128 and GROUPS is 1."""
    column_blocks = tl.cdiv(k, 128)
    block_row = tl.program_id(0) // column_blocks
    block_column = tl.program_id(0) % column_blocks
    row = block_row * 128 + tl.arange(0, 128)
    column = block_column * 128 + tl.arange(0, 128)
    wide_row, wide_column = row.to(tl.int64), column.to(tl.int64)
    mask = (row[:, None] < m) & (column[None, :] < k)
    at = x_ptr + wide_row[:, None] * x_row + wide_column[None, :] * x_column
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = block_row * scale_row + block_column * scale_column + tl.arange(0, 1)
    if GIVEN:
        scale = tl.load(given_ptr + block_row * given_row + block_column * given_column + tl.arange(0, 1))
    else:
        scale = scale_of(largest_magnitude(largest_magnitude(x, 1, NATIVE)[None, :], 1, NATIVE), POWER2)
    SHORT: tl.constexpr = NATIVE and not GIVEN and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    quotient = divide(x, scale[:, None], POWER2 and not GIVEN, SHORT)
    store_codes(codes_ptr + wide_row[:, None] * k + column[None, :], quotient, mask, NATIVE)
    tl.store(scale_ptr + at, scale)


@triton.jit
def _token_kernel(
    x_ptr, codes_ptr, scale_ptr, m, k, x_row, x_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LONG: tl.constexpr, NATIVE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, in pieces of COLUMNS columns; where one piece is the row (not LONG), it stays in registers."""
    begin(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wide_row, wide_column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    mask = (row[:, None] < m) & (column[None, :] < k)
    x = tl.load(x_ptr + wide_row * x_row + wide_column * x_column, mask=mask, other=0.0).to(tl.float32)
    amax = largest_magnitude(x, 1, NATIVE)
    if LONG:
        for start in range(COLUMNS, k, COLUMNS):
            at = start + column[None, :]
            part = x_ptr + wide_row * x_row + at.to(tl.int64) * x_column
            piece = tl.load(part, mask=(row[:, None] < m) & (at < k), other=0.0)
            amax = tl.maximum(amax, largest_magnitude(piece.to(tl.float32), 1, NATIVE), tl.PropagateNan.ALL)
    scale = scale_of(amax, False)
    tl.store(scale_ptr + row, scale, mask=row < m)
    scale = scale[:, None]
    SHORT: tl.constexpr = NATIVE and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    store_codes(codes_ptr + wide_row * k + column[None, :], divide(x, scale, False, SHORT), mask, NATIVE)
    if LONG:
        for start in range(COLUMNS, k, COLUMNS):
            at = start + column[None, :]
            mask = (row[:, None] < m) & (at < k)
            part = x_ptr + wide_row * x_row + at.to(tl.int64) * x_column
            piece = tl.load(part, mask=mask, other=0.0).to(tl.float32)
            store_codes(codes_ptr + wide_row * k + at, divide(piece, scale, False, SHORT), mask, NATIVE)


_GROUP, _TOKEN = Launcher(_group_kernel, early=True), Launcher(_token_kernel, early=True)
_BLOCK = Launcher(_block_kernel)
