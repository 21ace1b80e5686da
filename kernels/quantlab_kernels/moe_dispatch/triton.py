"""Places by counting, then each token quantized once and stored at all of its places.

The place of a choice is the number of choices that go before it: those of lower experts, and earlier ones of its own.
A few choices are compared in pairs, all in one launch. Many are counted in blocks: how many of each expert a block has,
how many the blocks before it have, and the pairs of the block itself. No atomics across programs: places repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.triton_fp8 import divide, largest_magnitude, scale_of, store_codes
from quantlab_kernels.common.triton_launch import Launcher, begin
from quantlab_kernels.moe_dispatch.op import Problem

MOST_AT_ONCE = 1024  # choices that are compared in pairs
_PAIRS = 4096  # of one program
_BLOCK, _FEW_EXPERTS, _BLOCKS = 256, 16, 256


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
    if size > MOST_AT_ONCE:
        _route_in_blocks(top_k_index, positions, counts, size, problem.experts)
    else:
        others = max(128, triton.next_power_of_2(size))
        mine = _PAIRS // others
        ranks = triton.cdiv(size, mine)
        _ROUTE(
            (ranks + triton.cdiv(problem.experts, mine),), (top_k_index, positions, counts),
            (size, problem.experts, ranks), (mine, others), 4,
        )  # fmt: skip
    native = problem.sm >= 89
    codes = codes if native else codes.view(torch.uint8)
    columns = 1024 if problem.group else triton.next_power_of_2(problem.k)
    _SCATTER(
        (problem.tokens * triton.cdiv(problem.k, columns),), (x, positions, codes, scale),
        (problem.k, *scale.stride(), problem.choices), (problem.group, columns, native), 4 if columns <= 4096 else 8,
    )  # fmt: skip


def _route_in_blocks(top_k_index: Tensor, positions: Tensor, counts: Tensor, size: int, experts: int) -> None:
    blocks, width = triton.cdiv(size, _BLOCK), triton.next_power_of_2(experts + 1)
    before = counts.new_empty((blocks + 1, width), dtype=torch.int32)  # the last row: of lower experts
    _COUNT((blocks,), (top_k_index, before), (size, experts), (_BLOCK, width), 4)
    _BEFORE((triton.cdiv(width, _FEW_EXPERTS),), (before, counts), (blocks, experts), (width, _BLOCKS, _FEW_EXPERTS), 4)
    _LOWER((1,), (before, counts), (blocks, experts), (width,), 1)
    _PLACE((blocks,), (top_k_index, before, positions), (size, experts, blocks), (_BLOCK, width, 32), 4)


@triton.jit
def _experts_of(index_ptr, at, size, experts):
    """The experts of choices; `experts` for one that no expert here takes."""
    expert = tl.load(index_ptr + at, mask=at < size, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < experts), expert, experts)


@triton.jit
def _count_kernel(
    index_ptr, before_ptr, size, experts, BLOCK: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """How many choices of a block each expert has."""
    begin(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = _experts_of(index_ptr, at, size, experts)
    tl.store(before_ptr + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.histogram(expert, WIDTH))


@triton.jit
def _before_kernel(
    before_ptr, counts_ptr, blocks, experts, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """For EXPERTS experts: counts of blocks become those of the blocks before; all of them are the expert's count."""
    begin(EARLY)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, blocks, BLOCKS):
        block = (start + tl.arange(0, BLOCKS))[:, None]
        at = before_ptr + block * WIDTH + expert[None, :]
        mask = (block < blocks) & (expert[None, :] < WIDTH)
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + expert, total.to(tl.int64), mask=expert < experts)


@triton.jit
def _lower_kernel(before_ptr, counts_ptr, blocks, experts, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """How many choices lower experts have."""
    begin(EARLY)
    expert = tl.arange(0, WIDTH)
    counts = tl.load(counts_ptr + expert, mask=expert < experts, other=0).to(tl.int32)
    tl.store(before_ptr + blocks * WIDTH + expert, tl.cumsum(counts, 0) - counts)


@triton.jit
def _place_kernel(
    index_ptr, before_ptr, positions_ptr, size, experts, blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    OTHERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Places of a block's choices."""
    begin(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = _experts_of(index_ptr, at, size, experts)
    place = tl.load(before_ptr + tl.program_id(0) * WIDTH + mine) + tl.load(before_ptr + blocks * WIDTH + mine)
    for start in range(0, BLOCK, OTHERS):
        other_at = tl.program_id(0) * BLOCK + start + tl.arange(0, OTHERS)
        other = _experts_of(index_ptr, other_at, size, experts)
        earlier = (other[None, :] == mine[:, None]) & (other_at[None, :] < at[:, None])
        place += tl.sum(earlier.to(tl.int32), 1)
    tl.store(positions_ptr + at, tl.where(mine == experts, -1, place), mask=at < size)


@triton.jit
def _route_kernel(
    index_ptr, positions_ptr, counts_ptr, size, experts, ranks, MINE: tl.constexpr, OTHERS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The first `ranks` programs place MINE choices each, of OTHERS at most; the others count those of MINE experts."""
    begin(EARLY)
    placing = tl.program_id(0) < ranks
    at = tl.where(placing, tl.program_id(0), tl.program_id(0) - ranks) * MINE + tl.arange(0, MINE)
    mine = at
    if placing:
        mine = _experts_of(index_ptr, at, size, experts)
    other_at = tl.arange(0, OTHERS)
    other = _experts_of(index_ptr, other_at, size, experts)
    hit = other[None, :] == mine[:, None]
    if placing:
        hit = (other[None, :] < mine[:, None]) | (hit & (other_at[None, :] < at[:, None]))
    found = tl.sum((hit & (other_at[None, :] < size)).to(tl.int32), axis=1)
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


_COUNT, _BEFORE = Launcher(_count_kernel, early=True), Launcher(_before_kernel, early=True)
_LOWER, _PLACE = Launcher(_lower_kernel, early=True), Launcher(_place_kernel, early=True)
_ROUTE, _SCATTER = Launcher(_route_kernel, early=True), Launcher(_scatter_kernel, early=True)
