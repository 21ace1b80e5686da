"""Two launches: places by counting, then each token quantized once and stored at all of its places.

The place of a choice is the number of choices that go before it: those of lower experts, and earlier ones of its own.
Counting compares all pairs, without atomics, so places repeat; a sort takes over where the pairs would take longer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.triton_fp8 import divide, largest_magnitude, scale_of, store_codes
from quantlab_kernels.common.triton_launch import Launcher, begin
from quantlab_kernels.moe_dispatch import reference
from quantlab_kernels.moe_dispatch.op import Problem

MOST_PAIRS = 1 << 26  # about 10 us of comparisons on an H200
_MINE, _OTHERS = 32, 128


def supports(problem: Problem) -> str | None:
    """Everything from sm_80 on."""
    return None if problem.sm >= 80 else f"needs sm_80 or newer, the GPU is sm_{problem.sm}"


def config(problem: Problem) -> None:
    return None


def launch(
    problem: Problem, x: Tensor, top_k_index: Tensor, codes: Tensor, scale: Tensor, positions: Tensor, counts: Tensor,
    config: None,
) -> None:  # fmt: skip
    """Fill codes, scale, positions and counts; x and top_k_index contiguous."""
    size = top_k_index.numel()
    if size * size > MOST_PAIRS:
        found = reference.route(top_k_index, problem.experts)
        positions.copy_(found[0])
        counts.copy_(found[1])
    else:
        ranks = triton.cdiv(size, _MINE)
        _ROUTE(
            (ranks + triton.cdiv(problem.experts, _MINE),), (top_k_index, positions, counts),
            (size, problem.experts, ranks), (_MINE, _OTHERS), 4,
        )  # fmt: skip
    native = problem.sm >= 89
    codes = codes if native else codes.view(torch.uint8)
    columns = 1024 if problem.group else triton.next_power_of_2(problem.k)
    _SCATTER(
        (problem.tokens * triton.cdiv(problem.k, columns),), (x, positions, codes, scale),
        (problem.k, *scale.stride(), problem.choices), (problem.group, columns, native), 4 if columns <= 4096 else 8,
    )  # fmt: skip


@triton.jit
def _route_kernel(
    index_ptr, positions_ptr, counts_ptr, size, experts, ranks, MINE: tl.constexpr, OTHERS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The first `ranks` programs place MINE choices each; the others count the rows of MINE experts each."""
    begin(EARLY)
    placing = tl.program_id(0) < ranks
    at = tl.where(placing, tl.program_id(0), tl.program_id(0) - ranks) * MINE + tl.arange(0, MINE)
    mine = at
    if placing:
        mine = tl.load(index_ptr + at, mask=at < size, other=0).to(tl.int32)
        mine = tl.where((mine >= 0) & (mine < experts), mine, experts)
    hits = tl.zeros((MINE, OTHERS), tl.int32)  # added up once, at the end
    for start in range(0, size, OTHERS):
        other_at = start + tl.arange(0, OTHERS)
        other = tl.load(index_ptr + other_at, mask=other_at < size, other=-1).to(tl.int32)
        other = tl.where((other >= 0) & (other < experts), other, experts)
        same = other[None, :] == mine[:, None]
        if placing:
            hit = (other[None, :] < mine[:, None]) | (same & (other_at[None, :] < at[:, None]))
        else:
            hit = same
        hits += (hit & (other_at[None, :] < size)).to(tl.int32)
    found = tl.sum(hits, axis=1)
    if placing:
        tl.store(positions_ptr + at, tl.where(mine == experts, -1, found), mask=at < size)
    else:
        tl.store(counts_ptr + at, found.to(tl.int64), mask=at < experts)


@triton.jit
def _scatter_kernel(
    x_ptr, positions_ptr, codes_ptr, scale_ptr, k, scale_row, scale_column, choices, GROUP: tl.constexpr,
    COLUMNS: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one token."""
    begin(EARLY)
    tiles = tl.cdiv(k, COLUMNS)
    token = tl.program_id(0) // tiles
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < k
    x = tl.load(x_ptr + token.to(tl.int64) * k + column, mask=mask, other=0.0).to(tl.float32)
    GROUPS: tl.constexpr = COLUMNS // 128 if GROUP else 1
    x = tl.reshape(x, (GROUPS, COLUMNS // GROUPS))
    scale = scale_of(largest_magnitude(x, 1, NATIVE), False)
    SHORT: tl.constexpr = NATIVE and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    values = tl.reshape(divide(x, scale[:, None], False, SHORT), (COLUMNS,))
    group = (tl.program_id(0) % tiles) * GROUPS + tl.arange(0, GROUPS)
    for choice in range(choices):
        row = tl.load(positions_ptr + token * choices + choice).to(tl.int64)
        if row >= 0:
            store_codes(codes_ptr + row * k + column, values, mask, NATIVE)
            inside = group * 128 < k
            tl.store(scale_ptr + row * scale_row + group.to(tl.int64) * scale_column, scale, mask=inside)


_ROUTE, _SCATTER = Launcher(_route_kernel, early=True), Launcher(_scatter_kernel, early=True)
