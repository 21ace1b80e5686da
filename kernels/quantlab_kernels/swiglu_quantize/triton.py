"""One pass: gate and up are read once, the product stays in registers, its codes and scales are written once.

Only rows with one scale that are too long for registers are read twice, the second time from L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.triton_fp8 import largest_magnitude, scale_of, store_codes
from quantlab_kernels.common.triton_launch import Launcher, begin

if TYPE_CHECKING:
    from quantlab_kernels.swiglu_quantize.op import Problem

LONGEST_ROW = 16384  # columns of a row with one scale that stay in registers


@dataclass(frozen=True)
class Config:
    """Tile of one program: rows, columns, warps."""

    rows: int
    columns: int
    num_warps: int


def supports(problem: Problem) -> str | None:
    """Everything from sm_80 on."""
    return None if problem.sm >= 80 else f"needs sm_80 or newer, the GPU is sm_{problem.sm}"


@remembered
def config(problem: Problem) -> Config:
    """Groups. Few rows: one per program, so that the chip fills. Many: tiles of 8 KB of 16-bit input and more.

    One scale for each row: whole rows, 16 columns a thread."""
    if not problem.group:
        columns = min(LONGEST_ROW, max(128, triton.next_power_of_2(problem.k)))
        rows = max(1, 2048 // columns)
        return Config(rows, columns, rows * columns // 512)
    if problem.m * problem.k <= 1 << 18:
        return Config(1, 128, 1)
    return Config(8, 256, 4)


def launch(problem: Problem, gate_up: Tensor, codes: Tensor, scale: Tensor, config: Config) -> None:
    """Fill codes [M, I] and scale [M, ceil(I/128)] or [M, 1]; gate_up may have any strides."""
    native = problem.sm >= 89
    tensors = gate_up, codes if native else codes.view(torch.uint8), scale
    rows, numbers = -(-problem.m // config.rows), (problem.m, problem.k, *gate_up.stride())
    if problem.group:
        grid = (rows * -(-problem.k // config.columns),)
        _GROUP(
            grid, tensors, (*numbers, *scale.stride()), (config.rows, config.columns // 128, native), config.num_warps
        )
    else:
        constants = config.rows, config.columns, problem.k > config.columns, native
        _TOKEN((rows,), tensors, numbers, constants, config.num_warps)


@triton.jit
def _product(at, k, x_column, mask):
    """silu(gate) * up in float32; `at` points to gates."""
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + k.to(tl.int64) * x_column, mask=mask, other=0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _group_kernel(
    x_ptr, codes_ptr, scale_ptr, m, k, x_row, x_column, scale_row, scale_column,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS rows of GROUPS groups of 128 columns."""
    begin(EARLY)
    tiles = tl.cdiv(k, 128 * GROUPS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % tiles) * GROUPS
    column = first * 128 + tl.arange(0, GROUPS * 128)
    group = first + tl.arange(0, GROUPS)
    wide_row, wide_column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    mask = (row[:, None] < m) & (column[None, :] < k)
    product = _product(x_ptr + wide_row * x_row + wide_column * x_column, k, x_column, mask)
    product = tl.reshape(product, (ROWS, GROUPS, 128))
    scale = scale_of(largest_magnitude(product, 2), False)
    quotient = tl.math.div_rn(product, tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, 128)))
    store_codes(codes_ptr + wide_row * k + column[None, :], tl.reshape(quotient, (ROWS, GROUPS * 128)), mask, NATIVE)
    scale_mask = (row[:, None] < m) & (group[None, :] * 128 < k)
    tl.store(scale_ptr + row[:, None] * scale_row + group[None, :].to(tl.int64) * scale_column, scale, mask=scale_mask)


@triton.jit
def _token_kernel(
    x_ptr, codes_ptr, scale_ptr, m, k, x_row, x_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LONG: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, in pieces of COLUMNS columns; where one piece is the row (not LONG), it stays in registers."""
    begin(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    inside = row[:, None] < m
    at = x_ptr + wide_row * x_row
    product = _product(at + column.to(tl.int64) * x_column, k, x_column, inside & (column < k))
    amax = largest_magnitude(product, 1, NATIVE)
    if LONG:
        for start in range(COLUMNS, k, COLUMNS):
            piece = _product(at + (start + column).to(tl.int64) * x_column, k, x_column, inside & (start + column < k))
            amax = tl.maximum(amax, largest_magnitude(piece, 1, NATIVE), tl.PropagateNan.ALL)
    scale = scale_of(amax, False)
    tl.store(scale_ptr + row, scale, mask=row < m)
    # A product in float32 is itself rounded, so that a multiplication by the reciprocal loses nothing that counts.
    inverse = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    inverse = tl.broadcast_to(inverse[:, None], (ROWS, COLUMNS))
    codes = codes_ptr + wide_row * k
    store_codes(codes + column, product * inverse, inside & (column < k), NATIVE)
    if LONG:
        for start in range(COLUMNS, k, COLUMNS):
            mask = inside & (start + column < k)
            piece = _product(at + (start + column).to(tl.int64) * x_column, k, x_column, mask)
            store_codes(codes + start + column, piece * inverse, mask, NATIVE)


_GROUP, _TOKEN = Launcher(_group_kernel, early=True), Launcher(_token_kernel, early=True)
