"""One pass: gate and up are read once, the product stays in registers, its codes and scales are written once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.triton_fp8 import largest_magnitude, scale_of, store_codes
from quantlab_kernels.common.triton_launch import Launcher

if TYPE_CHECKING:
    from quantlab_kernels.swiglu_quantize.op import Problem


@dataclass(frozen=True)
class Config:
    """Tile of one program: rows, groups of 128 columns, warps."""

    rows: int
    groups: int
    num_warps: int


def supports(problem: Problem) -> str | None:
    """Everything from sm_80 on."""
    return None if problem.sm >= 80 else f"needs sm_80 or newer, the GPU is sm_{problem.sm}"


@functools.cache
def config(problem: Problem) -> Config:
    """Few rows: one group per program, so that the chip fills. Many: tiles of 8 KB of 16-bit input and more."""
    if problem.m * problem.k <= 1 << 18:
        return Config(1, 1, 1)
    return Config(8, 2, 4)


def launch(problem: Problem, gate_up: Tensor, codes: Tensor, scale: Tensor, config: Config) -> None:
    """Fill codes [M, I] and scale [M, ceil(I/128)]; gate_up may have any strides."""
    native = problem.sm >= 89
    grid = (-(-problem.m // config.rows) * -(-problem.k // (128 * config.groups)),)
    tensors = gate_up, codes if native else codes.view(torch.uint8), scale
    numbers = problem.m, problem.k, *gate_up.stride(), *scale.stride()
    _LAUNCH(grid, tensors, numbers, (config.rows, config.groups, native), config.num_warps)


@triton.jit
def _kernel(
    x_ptr, codes_ptr, scale_ptr, m, k, x_row, x_column, scale_row, scale_column,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(k, 128 * GROUPS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % tiles) * GROUPS
    column = first * 128 + tl.arange(0, GROUPS * 128)
    group = first + tl.arange(0, GROUPS)
    wide_row = row.to(tl.int64)[:, None]
    mask = (row[:, None] < m) & (column[None, :] < k)
    at = x_ptr + wide_row * x_row + column[None, :] * x_column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + k.to(tl.int64) * x_column, mask=mask, other=0.0).to(tl.float32)
    product = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (ROWS, GROUPS, 128))
    scale = scale_of(largest_magnitude(product, 2), False)
    quotient = tl.math.div_rn(product, tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, 128)))
    store_codes(codes_ptr + wide_row * k + column[None, :], tl.reshape(quotient, (ROWS, GROUPS * 128)), mask, NATIVE)
    scale_mask = (row[:, None] < m) & (group[None, :] * 128 < k)
    tl.store(scale_ptr + row[:, None] * scale_row + group[None, :].to(tl.int64) * scale_column, scale, mask=scale_mask)


_LAUNCH = Launcher(_kernel)
