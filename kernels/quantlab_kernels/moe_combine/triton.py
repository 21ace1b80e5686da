"""One pass: a program gathers the rows of some columns of one token and adds them up in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.triton_launch import Launcher, begin
from quantlab_kernels.moe_combine.op import Problem


def supports(problem: Problem) -> str | None:
    """Everything from sm_80 on."""
    return None if problem.sm >= 80 else f"needs sm_80 or newer, the GPU is sm_{problem.sm}"


def config(problem: Problem) -> None:
    return None


def launch(problem: Problem, y: Tensor, positions: Tensor, weights: Tensor, out: Tensor, config: None) -> None:
    """Fill out [T, K]; all operands contiguous."""
    columns = 1024
    grid = (problem.tokens * triton.cdiv(problem.k, columns),)
    _LAUNCH(grid, (y, positions, weights, out), (problem.k,), (problem.choices, columns), 4)


@triton.jit
def _kernel(
    y_ptr, positions_ptr, weights_ptr, out_ptr, k, CHOICES: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    begin(EARLY)
    tiles = tl.cdiv(k, COLUMNS)
    token = tl.program_id(0) // tiles
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < k
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(positions_ptr + token * CHOICES + choice).to(tl.int64)
        weight = tl.load(weights_ptr + token * CHOICES + choice).to(tl.float32)
        values = tl.load(y_ptr + tl.maximum(row, 0) * k + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(row >= 0, weight * values, 0.0)
    tl.store(out_ptr + token.to(tl.int64) * k + column, total.to(out_ptr.dtype.element_ty), mask=mask)


_LAUNCH = Launcher(_kernel, early=True)
