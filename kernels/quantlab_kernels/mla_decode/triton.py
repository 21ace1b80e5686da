"""The portable backend, in the transposed schedule: tokens and channels are rows of the products, heads are columns.

A program takes a share of a sequence's tokens for a tile of rows (heads times queries), a second kernel adds shares.
Scores are ``C q^T`` [tokens, rows], outputs ``C^T p`` [channels, rows]: matrix units want 64 rows, which tokens and
channels always fill, while 16 heads would be three quarters padding (ETAP, arXiv 2506.01969). A tile of latents is read
once and multiplied twice.

Codes become float16 exactly and multiply float16 queries and weights. The scale of a token multiplies its scores, and
goes into the exponent of its weight: ``p s = exp2(x + log2 s)`` is taken relative to its own largest, so that float16
keeps the small weights of a long sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.attention_decode.splits import splits
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.common.triton_fp8 import decode_e4m3
from quantlab_kernels.common.triton_launch import Launcher
from quantlab_kernels.kv_append.triton import KINDS

if TYPE_CHECKING:
    from quantlab_kernels.mla_decode.op import Problem

RANKS, ROPES = (64, 128, 256, 512), (16, 32, 64, 128)  # channels that there are kernels for


@dataclass(frozen=True)
class Config:
    """rows: heads times queries of a tile;  tokens of a tile;  warps;  stages of loads in flight;  resident: CTAs an SM
    is expected to hold, by which the work is divided."""

    rows: int
    tokens: int
    warps: int
    stages: int
    resident: int = 1


def supports(problem: Problem) -> str | None:
    """What has been held against the definition on a GPU; the rest of what it is able to do waits for that."""
    p, reason = problem, able(problem)
    if reason is not None:
        return reason
    if p.sm != 90 or p.dtype != p.kept:
        return (
            "verified on Hopper alone, for queries in the cache's dtype; QUANTLAB_MLA_DECODE_BACKEND=triton runs others"
        )
    return None


def able(problem: Problem) -> str | None:
    p = problem
    if p.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{p.sm}"
    if p.rank not in RANKS or p.rope not in ROPES:
        return f"{p.rank} latent channels and {p.rope} of the position; there are kernels for {RANKS} and {ROPES}"
    if p.kept == torch.float32:
        return "the cache keeps float32, needs bfloat16 or float16"
    return None


def config(problem: Problem) -> Config:
    """Tiles that fit the registers and the shared memory of an SM; all rows up to 64 share one pass over the tokens.

    On Hopper 4 warps with 1 stage (64 tokens, two CTAs on an SM) lose: Triton 3.6 made wrong results and illegal
    accesses of them for every format, where 4 warps with 2 stages, and 8 with either, are right.
    """
    if problem.sm < 90:
        return Config(16, 32, 4, 1)
    rows = min(64, max(16, triton.next_power_of_2(problem.heads * problem.sq)))
    return Config(rows, 64, 8, 2) if problem.code == "float" else Config(rows, 128, 8, 1)


def launch(
    problem: Problem, q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor, start: Tensor | None,
    table: Tensor | None, scale: float, out: Tensor, lse: Tensor, chosen: Config | None = None,
) -> None:  # fmt: skip
    """Fill out [B, Sq, H, L] and lse [B, H, Sq]."""
    p, c, native = problem, chosen or config(problem), problem.sm >= 89
    rows = p.heads * p.sq
    tiles = -(-rows // c.rows)
    count = splits(p.batch * tiles, p.longest, c.resident * gpu_of(q_latent).sm_count)
    part, sums = out, lse
    if count > 1:
        part = q_latent.new_empty((count, p.batch, rows, p.rank), dtype=torch.float32)
        sums = q_latent.new_empty((count, p.batch, rows), dtype=torch.float32)
    codes = cache.latent
    if codes.dtype == torch.float8_e4m3fn and not native:
        codes = codes.view(torch.uint8)
    absent = length
    tensors = (
        q_latent, q_rope, codes, cache.rope, absent if cache.scale is None else cache.scale, length,
        absent if start is None else start, absent if table is None else table, part, sums,
    )  # fmt: skip
    numbers = (
        p.batch, p.heads, p.sq, cache.capacity, 0 if table is None else table.stride(0), scale,
        *q_latent.stride(), *q_rope.stride(), codes.stride(0), cache.rope.stride(0),
        0 if cache.scale is None else cache.scale.stride(0),
    )  # fmt: skip
    constants = (
        p.rank, p.rope, c.rows, c.tokens, KINDS[p.code], start is not None, table is not None, p.sq > 1, count == 1,
        native,
    )  # fmt: skip
    _ATTEND[c.stages]((tiles, count, p.batch), tensors, numbers, constants, c.warps)
    if count > 1:
        parts = triton.next_power_of_2(count)
        columns = min(p.rank, max(64, 4096 // parts))  # so that a program holds no more than registers do
        grid = rows, p.batch, p.rank // columns
        _MERGE(grid, (part, sums, out, lse), (count, p.batch, p.heads, p.sq), (p.rank, parts, columns), 4)


@triton.jit
def _bytes_as_halves(x):
    """INT8 codes as float16: a byte below 1024's exponent is 1024 + byte; four at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t, c;
        xor.b32 t, $2, 0x80808080;
        mov.b32 c, 0x64;
        prmt.b32 $0, t, c, 0x4140;
        prmt.b32 $1, t, c, 0x4342;
        mov.b32 c, 0x64806480;
        sub.f16x2 $0, $0, c;
        sub.f16x2 $1, $1, c;
        }""",
        "=&r,=&r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _nibbles_as_halves(x):
    """Both halves of an INT4 row as float16, 2 code - 15; four bytes at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 l, h, c;
        shl.b32 l, $4, 1;
        shr.u32 h, $4, 3;
        and.b32 l, l, 0x1E1E1E1E;
        and.b32 h, h, 0x1E1E1E1E;
        mov.b32 c, 0x64;
        prmt.b32 $0, l, c, 0x4140;
        prmt.b32 $1, l, c, 0x4342;
        prmt.b32 $2, h, c, 0x4140;
        prmt.b32 $3, h, c, 0x4342;
        mov.b32 c, 0x640F640F;
        sub.f16x2 $0, $0, c;
        sub.f16x2 $1, $1, c;
        sub.f16x2 $2, $2, c;
        sub.f16x2 $3, $3, c;
        }""",
        "=&r,=&r,=&r,=&r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _load(
    latent_ptr, rope_ptr, scale_ptr, table_ptr, batch, table_row, capacity, step, low, end, l_row, r_row, s_row,
    L: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Codes of both halves, position parts and scales of the tokens of a tile; 0 (scales: 1) outside low .. end - 1.

    Rows follow each other without a gap, so that the addresses of a dense tile are constants but for the first.
    """
    HALF: tl.constexpr = L // 2
    WIDTH: tl.constexpr = HALF if KIND == 2 else L
    token, half, turned = tl.arange(0, BN), tl.arange(0, HALF), tl.arange(0, R)
    valid = (token >= low - step) & (token < end - step)
    if PAGED:
        position = step + token
        page = tl.load(table_ptr + batch * table_row + position // capacity, mask=valid, other=0).to(tl.int64)
        slot = (position % capacity).to(tl.int64)
        latent_at = latent_ptr + (page * l_row + slot * WIDTH)[:, None] + half[None, :]
        rope_at = rope_ptr + (page * r_row + slot * R)[:, None] + turned[None, :]
        scale_at = scale_ptr + (page * s_row + slot)
    else:
        slot = step.to(tl.int64)
        latent_at = latent_ptr + (batch * l_row + slot * WIDTH) + (token[:, None] * WIDTH + half[None, :])
        rope_at = rope_ptr + (batch * r_row + slot * R) + (token[:, None] * R + turned[None, :])
        scale_at = scale_ptr + (batch * s_row + slot) + token
    first = tl.load(latent_at, mask=valid[:, None], other=0 if KIND == 2 else 0.0)
    second = first
    if KIND != 2:
        second = tl.load(latent_at + HALF, mask=valid[:, None], other=0.0)
    rope = tl.load(rope_at, mask=valid[:, None], other=0.0)
    scales = tl.full((BN,), 1.0, tl.float32)
    if KIND != 3:
        scales = tl.load(scale_at, mask=valid, other=1.0)
    return first, second, rope, scales


@triton.jit
def _operands(first, second, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Both halves of a tile's latents [tokens, L / 2] as operands of products, from what `_load` read of them."""
    if KIND == 2:
        if NATIVE:
            low, high = _nibbles_as_halves(first)
        else:
            low = (2 * (first & 15).to(tl.int16) - 15).to(tl.float16)
            high = (2 * (first >> 4).to(tl.int16) - 15).to(tl.float16)
    elif KIND == 0 and not NATIVE:
        low, high = decode_e4m3(first), decode_e4m3(second)
    elif KIND == 1 and NATIVE:
        low, high = _bytes_as_halves(first), _bytes_as_halves(second)
    elif KIND != 3:
        low, high = first.to(tl.float16), second.to(tl.float16)
    else:
        low, high = first, second
    return low, high


@triton.jit(do_not_specialize=["batches", "heads", "sq", "capacity", "table_row"])
def _attend(
    ql_ptr, qr_ptr, latent_ptr, rope_ptr, scale_ptr, length_ptr, start_ptr, table_ptr, out_ptr, lse_ptr, batches,
    heads, sq, capacity, table_row, scale, ql_batch, ql_token, ql_head, ql_column, qr_batch, qr_token, qr_head,
    qr_column, l_row, r_row, s_row,
    L: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, START: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = L // 2
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = heads * sq
    row = tl.program_id(0) * BH + tl.arange(0, BH)
    inside = row < rows
    head, query = row % heads, row // heads
    length = tl.load(length_ptr + batch)
    if not PAGED:
        length = tl.minimum(length, capacity)
    start = 0
    if START:
        start = tl.maximum(tl.load(start_ptr + batch), 0)
    place = length - sq + query
    first = start // BN * BN
    share = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), tl.num_programs(1)), BN) * BN
    begin = first + split * share
    end = tl.minimum(begin + share, length)

    # Queries, the largest of a row near 128 by a power of two, as columns.
    half, turned = tl.arange(0, HALF), tl.arange(0, R)
    q_at = ql_ptr + batch * ql_batch + query * ql_token + head * ql_head
    q_low = tl.load(q_at[:, None] + half[None, :] * ql_column, mask=inside[:, None], other=0.0).to(tl.float32)
    q_high = tl.load(q_at[:, None] + (half + HALF)[None, :] * ql_column, mask=inside[:, None], other=0.0).to(tl.float32)
    q_at = qr_ptr + batch * qr_batch + query * qr_token + head * qr_head
    q_rope = tl.load(q_at[:, None] + turned[None, :] * qr_column, mask=inside[:, None], other=0.0).to(tl.float32)
    most = tl.maximum(tl.maximum(tl.max(tl.abs(q_low), 1), tl.max(tl.abs(q_high), 1)), tl.max(tl.abs(q_rope), 1))
    raised = tl.math.exp2(tl.math.floor(7.0 - tl.math.log2(tl.maximum(most, 1e-30))))
    factor = scale * 1.4426950408889634 / raised
    kept: tl.constexpr = rope_ptr.dtype.element_ty
    kind: tl.constexpr = kept if KIND == 3 else tl.float16
    q_low, q_high = (q_low * raised[:, None]).to(kind), (q_high * raised[:, None]).to(kind)
    q_rope = (q_rope * raised[:, None]).to(kept)

    largest = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    low_out = tl.zeros((HALF, BH), tl.float32)
    high_out = tl.zeros((HALF, BH), tl.float32)
    token = tl.arange(0, BN)
    # Codes are loaded a tile ahead and become operands at the end of a step: what enters a step is stored in shared
    # memory once, where both products read it. 16-bit tiles go there by themselves (cp.async).
    if KIND != 3:
        codes, codes2, rope, scales = _load(
            latent_ptr, rope_ptr, scale_ptr, table_ptr, batch, table_row, capacity, begin, start, end, l_row,
            r_row, s_row, L, R, BN, KIND, PAGED,
        )  # fmt: skip
        low, high = _operands(codes, codes2, KIND, NATIVE)
    for step in tl.range(begin, end, BN):
        ahead = step if KIND == 3 else step + BN
        codes, codes2, rope_next, scales_next = _load(
            latent_ptr, rope_ptr, scale_ptr, table_ptr, batch, table_row, capacity, ahead, start, end, l_row,
            r_row, s_row, L, R, BN, KIND, PAGED,
        )  # fmt: skip
        if KIND == 3:
            low, high, rope, scales = codes, codes2, rope_next, scales_next
        position = step + token
        valid = (position >= start) & (position < end)
        x = tl.dot(low, tl.trans(q_low))
        x = tl.dot(high, tl.trans(q_high), x)
        if KIND == 3:
            x = tl.dot(rope, tl.trans(q_rope), x)
        else:
            x = x * scales[:, None] + tl.dot(rope, tl.trans(q_rope))
        x = x * factor[None, :] + tl.where(valid, tl.math.log2(scales), float("-inf"))[:, None]
        if CAUSAL:
            x = tl.where(position[:, None] <= place[None, :], x, float("-inf"))
        grown = tl.maximum(largest, tl.max(x, 0))
        reference = tl.where(grown == float("-inf"), 0.0, grown)
        rescale = tl.math.exp2(largest - reference)
        weight = tl.math.exp2(x - (reference - 8.0)[None, :])  # times the scale, and 256
        total = total * rescale + tl.sum(weight * (0.00390625 / scales)[:, None], 0)
        weight = weight.to(low.dtype)
        low_out = tl.dot(tl.trans(low), weight, low_out * rescale[None, :])
        high_out = tl.dot(tl.trans(high), weight, high_out * rescale[None, :])
        largest = grown
        if KIND != 3:
            low, high = _operands(codes, codes2, KIND, NATIVE)
            rope, scales = rope_next, scales_next

    some = total > 0.0
    share_of = tl.where(some, 0.00390625 / total, 0.0)
    found = tl.where(some, (largest + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    if WHOLE:
        at, sum_at = batch * rows + row, (batch * heads + head) * sq + query
    else:
        at = (split * batches + batch) * rows + row
        sum_at = at
    tl.store(lse_ptr + sum_at, found, mask=inside)
    target = out_ptr + at[None, :] * L + half[:, None]
    kind_out: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(target, (low_out * share_of[None, :]).to(kind_out), mask=inside[None, :])
    tl.store(target + HALF, (high_out * share_of[None, :]).to(kind_out), mask=inside[None, :])


@triton.jit
def _merge(
    part_ptr, sums_ptr, out_ptr, lse_ptr, count, batches, heads, sq,
    L: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of a row: the sum of its parts, each by its share of all weights."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = heads * sq
    split, column = tl.arange(0, COUNT), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    at = (split * batches + batch) * rows + row
    lse = tl.load(sums_ptr + at, mask=split < count, other=float("-inf"))
    top = tl.max(lse, 0)
    share = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))
    whole = tl.sum(share, 0)
    some = tl.where(whole > 0.0, whole, 1.0)
    part = tl.load(part_ptr + at[:, None] * L + column[None, :], mask=(share > 0.0)[:, None], other=0.0)
    out = tl.sum(part * share[:, None], 0) / some
    found = tl.where(whole > 0.0, top + tl.math.log(some), float("-inf"))
    if tl.program_id(2) == 0:
        tl.store(lse_ptr + (batch * heads + row % heads) * sq + row // heads, found)
    tl.store(out_ptr + (batch * rows + row) * L + column, out.to(out_ptr.dtype.element_ty))


_ATTEND = {stages: Launcher(_attend, num_stages=stages) for stages in (1, 2, 3, 4)}
_MERGE = Launcher(_merge)
