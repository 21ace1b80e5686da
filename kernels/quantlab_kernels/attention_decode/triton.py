"""The portable backend: a program takes a share of a sequence's tokens for one KV head, a second kernel adds shares.

All queries of a KV head are rows of one tile. Codes become float16 exactly and multiply float16 queries and weights;
scales of keys multiply scores, scales of values go into the exponent of the weights, so that float16 keeps small
weights of a long sequence: ``p s_v = exp2(x + log2 s_v)`` is taken relative to its own largest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.attention_decode.reference import Attributes
from quantlab_kernels.attention_decode.splits import splits
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.kv import PackedKV
from quantlab_kernels.common.triton_fp8 import decode_e4m3
from quantlab_kernels.common.triton_launch import Launcher
from quantlab_kernels.kv_append.triton import KINDS, _strides

if TYPE_CHECKING:
    from quantlab_kernels.attention_decode.op import Problem

ROWS = 64  # most rows of a tile
NEAR_TILE = 32  # tokens in 16 bits at a time: larger tiles cost registers that tiles of codes could have


def supports(problem: Problem) -> str | None:
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if problem.d > 256:
        return f"head dim {problem.d}, at most 256"
    return None


def launch(
    problem: Problem, q: Tensor, cache: PackedKV, length: Tensor, start: Tensor | None, table: Tensor | None,
    attributes: Attributes, sinks: Tensor | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill out [B, Sq, Hq, D] and lse [B, Hq, Sq]."""
    p, native = problem, problem.sm >= 89
    rows = p.heads_q // p.heads_kv * p.sq
    bm = min(ROWS, max(16, triton.next_power_of_2(rows)))
    bn = 64 if p.d > 128 or bm > 32 else 128
    tiles = -(-rows // bm)
    tokens = p.longest if p.window < 0 else min(p.longest, p.window + p.sq)
    count = splits(p.batch * p.heads_kv * tiles, tokens, 2 * gpu_of(q).sm_count)
    part = q.new_empty((count, p.batch, p.heads_kv, rows, p.d), dtype=torch.float32)
    sums = q.new_empty((count, p.batch, p.heads_kv, rows, 2), dtype=torch.float32)
    absent = length

    def given(t: Tensor | None) -> Tensor:
        return absent if t is None else t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn and not native else t

    tensors = (
        q, given(cache.k), given(cache.k_scale), given(cache.v), given(cache.v_scale), given(cache.k_near),
        given(cache.v_near), given(cache.k_mean), given(cache.k_channel), length, given(start), given(table), part,
        sums,
    )  # fmt: skip
    numbers = (
        p.batch, p.heads_kv, p.sq, rows, tiles, cache.capacity, 0 if table is None else table.stride(0), cache.first,
        cache.newest, attributes.window, attributes.scale, attributes.softcap, *q.stride(), *cache.k.stride()[:3],
        *cache.v.stride()[:3], *_strides(cache.k_scale), *_strides(cache.v_scale), *_strides(cache.k_near),
        *_strides(cache.v_near), *_strides(cache.k_mean, 2), *_strides(cache.k_channel, 2),
    )  # fmt: skip
    wide = triton.next_power_of_2(p.d)
    constants = (
        p.d, wide, p.heads_q // p.heads_kv, bm, bn, NEAR_TILE, KINDS[p.key], KINDS[p.value], cache.k_mean is not None,
        cache.k_channel is not None, start is not None, table is not None, cache.k_near is not None, cache.ring,
        attributes.window >= 0, attributes.softcap > 0, native,
    )  # fmt: skip
    _ATTEND((count, p.heads_kv * tiles, p.batch), tensors, numbers, constants, 4)
    merge = (
        part, sums, absent if sinks is None else sinks, out, lse
    )  # fmt: skip
    _MERGE(
        (rows, p.heads_kv, p.batch), merge, (count, p.batch, p.heads_kv, p.sq, rows),
        (p.d, wide, p.heads_q // p.heads_kv, triton.next_power_of_2(count), sinks is not None), 1 if count <= 8 else 4,
    )  # fmt: skip


@triton.jit
def _codes(x, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of a byte each, or floats, as an operand of a product."""
    if KIND == 0:
        operand = x.to(tl.float16) if NATIVE else decode_e4m3(x)
    elif KIND == 1:
        operand = x.to(tl.float16)
    else:
        operand = x
    return operand


@triton.jit
def _nibbles(x):
    """Both halves of an INT4 row as float16: a code in the low bits of 1024 is 1024 + code."""
    wide = x.to(tl.int16)
    low = ((wide & 15) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    high = ((wide >> 4) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    return low.to(tl.float16), high.to(tl.float16)


@triton.jit
def _seen(x, position, place, first, last, window, WINDOW: tl.constexpr):
    """Scores of the tokens first .. last - 1 that a row at `place` sees; -inf for others."""
    seen = ((position >= first) & (position < last))[None, :] & (position[None, :] <= place[:, None])
    if WINDOW:
        seen = seen & (position[None, :] > place[:, None] - window)
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    """x in units of log2; tanh(y) = 1 - 2 / (1 + exp(2 y))."""
    if SOFTCAP:
        cap = softcap * 1.4426950408889634
        x = cap - 2.0 * cap / (1.0 + tl.math.exp2(x * (2.0 / softcap)))
    return x


@triton.jit
def _weights(x, log_scale, largest, total):
    """(weights times values' scales, weights, grown maximum, factor of earlier sums, grown total)."""
    y = x + log_scale[None, :]
    grown = tl.maximum(largest, tl.max(y, 1))
    reference = tl.where(grown == float("-inf"), 0.0, grown)
    weight = tl.math.exp2(x - reference[:, None])
    rescale = tl.math.exp2(largest - reference)
    scaled = tl.math.exp2(y - reference[:, None] + 8.0)
    return scaled, weight, grown, rescale, total * rescale + tl.sum(weight, 1)


@triton.jit
def _attend(
    q_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, k_near_ptr, v_near_ptr, mean_ptr, channel_ptr, length_ptr,
    start_ptr, table_ptr, part_ptr, sums_ptr, batches, heads, sq, rows, tiles, capacity, table_row, first, newest,
    window, scale, softcap, q_batch, q_head, q_token, q_column, k_row, k_head, k_slot, v_row, v_head, v_slot,
    ks_row, ks_head, ks_slot, vs_row, vs_head, vs_slot, kn_row, kn_head, kn_slot, vn_row, vn_head, vn_slot,
    mean_batch, mean_head, channel_batch, channel_head,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, MEAN: tl.constexpr, CHANNEL: tl.constexpr, START: tl.constexpr,
    PAGED: tl.constexpr, NEAR: tl.constexpr, RING: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    HP: tl.constexpr = DP // 2 if DP > 16 else 16
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head, tile = (tl.program_id(1) // tiles).to(tl.int64), tl.program_id(1) % tiles
    length = tl.load(length_ptr + batch)
    if not RING and not PAGED:
        length = tl.minimum(length, capacity)
    start = 0
    if START:
        start = tl.maximum(tl.load(start_ptr + batch), 0)
    row = tile * BM + tl.arange(0, BM)
    inside = row < rows
    place = length - sq + row // GROUP
    low = start
    if WINDOW:
        low = tl.maximum(low, length - sq + 1 - window)
    if RING:
        low = tl.maximum(low, length - capacity)
    low, high = tl.maximum(low, start + first), length - newest
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(0)), BN) * BN
    begin = low + split * share
    end = tl.minimum(begin + share, high)

    # Queries times the keys' channels, in float16 with the largest of a row near 128.
    column, half = tl.arange(0, DP), tl.arange(0, HP)
    query = (head * GROUP + row % GROUP) * q_head + (row // GROUP) * q_token
    q_at = q_ptr + batch * q_batch + query[:, None]
    known = inside[:, None] & (column < D)[None, :]
    raw = tl.load(q_at + column[None, :] * q_column, mask=known, other=0.0)
    to_power = scale * 1.4426950408889634
    shift = tl.zeros((BM,), tl.float32)
    if MEAN:
        mean = tl.load(mean_ptr + batch * mean_batch + head * mean_head + column, mask=column < D, other=0.0)
        shift = tl.sum(raw.to(tl.float32) * mean[None, :], 1) * to_power
    wide = raw.to(tl.float32)
    if CHANNEL:
        at = channel_ptr + batch * channel_batch + head * channel_head + column
        wide = wide * tl.load(at, mask=column < D, other=0.0)[None, :]
    exponent = tl.math.exp2(tl.math.floor(7.0 - tl.math.log2(tl.maximum(tl.max(tl.abs(wide), 1), 1e-30))))
    factor = to_power / exponent
    q_dtype: tl.constexpr = k_ptr.dtype.element_ty if KEY == 3 else tl.float16
    q = (wide * exponent[:, None]).to(q_dtype)
    q_sum = tl.zeros((BM,), tl.float32)
    q_low = q
    q_high = q
    if KEY == 2:
        parts = inside[:, None] & (half < HALF)[None, :]
        one = tl.load(q_at + half[None, :] * q_column, mask=parts, other=0.0).to(tl.float32)
        two = tl.load(q_at + (half + HALF)[None, :] * q_column, mask=parts, other=0.0).to(tl.float32)
        if CHANNEL:
            at = channel_ptr + batch * channel_batch + head * channel_head + half
            one *= tl.load(at, mask=half < HALF, other=0.0)[None, :]
            two *= tl.load(at + HALF, mask=half < HALF, other=0.0)[None, :]
        q_low, q_high = (one * exponent[:, None]).to(tl.float16), (two * exponent[:, None]).to(tl.float16)
        q_sum = tl.sum(q_low.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)

    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    zeros = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, DP), tl.float32)
    out_low = tl.zeros((BM, HP), tl.float32)
    out_high = tl.zeros((BM, HP), tl.float32)
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr = (
        k_ptr + head * k_head, v_ptr + head * v_head, k_scale_ptr + head * ks_head, v_scale_ptr + head * vs_head
    )  # fmt: skip
    for step in tl.range(begin, end, BN):
        position = step + tl.arange(0, BN)
        valid = position < end
        if PAGED:
            page = tl.load(table_ptr + batch * table_row + position // capacity, mask=valid, other=0).to(tl.int64)
            slot = position % capacity
        elif RING:
            page, slot = position.to(tl.int64) * 0 + batch, position % capacity
        else:
            page, slot = position.to(tl.int64) * 0 + batch, position
        k_at = k_ptr + page * k_row + slot.to(tl.int64) * k_slot
        v_at = v_ptr + page * v_row + slot.to(tl.int64) * v_slot
        ks_at = k_scale_ptr + page * ks_row + slot.to(tl.int64) * ks_slot
        vs_at = v_scale_ptr + page * vs_row + slot.to(tl.int64) * vs_slot
        if KEY == 2:
            codes = tl.load(k_at[:, None] + half[None, :], mask=valid[:, None] & (half < HALF)[None, :], other=0)
            k_low, k_high = _nibbles(codes)
            x = tl.dot(q_low, tl.trans(k_low)) + tl.dot(q_high, tl.trans(k_high))
            k_scale = tl.load(ks_at, mask=valid, other=0.0).to(tl.float32)
            k_zero = tl.load(ks_at + 1, mask=valid, other=0.0).to(tl.float32)
            x = x * k_scale[None, :] + q_sum[:, None] * k_zero[None, :]
        else:
            codes = tl.load(k_at[:, None] + column[None, :], mask=valid[:, None] & (column < D)[None, :], other=0.0)
            x = tl.dot(q, tl.trans(_codes(codes, KEY, NATIVE)))
            if KEY != 3:
                x = x * tl.load(ks_at, mask=valid, other=0.0)[None, :]
        x = _capped(x * factor[:, None] + shift[:, None], softcap, SOFTCAP)
        x = _seen(x, position, place, begin, end, window, WINDOW)
        v_scale = tl.full((BN,), 1.0, tl.float32)
        if VALUE != 3:
            v_scale = tl.load(vs_at, mask=valid, other=1.0).to(tl.float32)
        scaled, weight, largest, rescale, total = _weights(x, tl.math.log2(v_scale), largest, total)
        if VALUE == 2:
            codes = tl.load(v_at[:, None] + half[None, :], mask=valid[:, None] & (half < HALF)[None, :], other=0)
            v_low, v_high = _nibbles(codes)
            out_low = out_low * rescale[:, None] + tl.dot(scaled.to(tl.float16), v_low)
            out_high = out_high * rescale[:, None] + tl.dot(scaled.to(tl.float16), v_high)
            v_zero = tl.load(vs_at + 1, mask=valid, other=0.0).to(tl.float32)
            zeros = zeros * rescale + tl.sum(weight * v_zero[None, :], 1)
        else:
            codes = tl.load(v_at[:, None] + column[None, :], mask=valid[:, None] & (column < D)[None, :], other=0.0)
            v = _codes(codes, VALUE, NATIVE)
            out = out * rescale[:, None] + tl.dot(scaled.to(v.dtype), v)

    if NEAR:
        near_total = tl.where(split == 0, first + newest, 0)  # the first split's work
        q_near = raw.to(k_near_ptr.dtype.element_ty)
        for step in tl.range(0, near_total, NB):
            slot = step + tl.arange(0, NB)
            late = slot - first
            age = tl.where(late >= 0, (length - 1 - late) // tl.maximum(newest, 1), 0)
            position = tl.where(slot < first, start + slot, late + newest * age)
            valid = (slot < near_total) & (position < length) & (late < length)
            valid = valid & ((slot < first) | (position >= start + first))
            mask = valid[:, None] & (column < D)[None, :]
            near_at = slot.to(tl.int64)[:, None]
            near_k = tl.load(
                k_near_ptr + batch * kn_row + head * kn_head + near_at * kn_slot + column[None, :], mask=mask, other=0.0
            )
            near_x = _capped(tl.dot(q_near, tl.trans(near_k)) * to_power, softcap, SOFTCAP)
            near_x = _seen(
                tl.where(valid[None, :], near_x, float("-inf")), position, place, start, length, window, WINDOW
            )
            scaled, weight, largest, rescale, total = _weights(near_x, tl.zeros((NB,), tl.float32), largest, total)
            near_v = tl.load(
                v_near_ptr + batch * vn_row + head * vn_head + near_at * vn_slot + column[None, :],
                mask=mask,
                other=0.0,
            )
            out = out * rescale[:, None] + tl.dot(scaled.to(near_v.dtype), near_v)
            zeros = zeros * rescale
            out_low = out_low * rescale[:, None]
            out_high = out_high * rescale[:, None]

    at = ((split * batches + batch) * heads + head) * rows + row
    tl.store(sums_ptr + at * 2, largest, mask=inside)
    tl.store(sums_ptr + at * 2 + 1, total, mask=inside)
    if VALUE == 2:
        parts = inside[:, None] & (half < HALF)[None, :]
        near_low = tl.zeros((BM, HP), tl.float32)
        near_high = near_low
        if NEAR:
            tl.store(part_ptr + at[:, None] * D + column[None, :], out, mask=known)
            tl.debug_barrier()
            near_low = tl.load(part_ptr + at[:, None] * D + half[None, :], mask=parts, other=0.0)
            near_high = tl.load(part_ptr + at[:, None] * D + HALF + half[None, :], mask=parts, other=0.0)
            tl.debug_barrier()
        out_low = (out_low + near_low) * 0.00390625 + zeros[:, None]
        out_high = (out_high + near_high) * 0.00390625 + zeros[:, None]
        tl.store(part_ptr + at[:, None] * D + half[None, :], out_low, mask=parts)
        tl.store(part_ptr + at[:, None] * D + HALF + half[None, :], out_high, mask=parts)
    else:
        tl.store(part_ptr + at[:, None] * D + column[None, :], out * 0.00390625, mask=known)


@triton.jit
def _merge(
    part_ptr, sums_ptr, sinks_ptr, out_ptr, lse_ptr, count, batches, heads, sq, rows,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    split, column = tl.arange(0, COUNT), tl.arange(0, DP)
    at = ((split * batches + batch) * heads + head) * rows + row
    largest = tl.load(sums_ptr + at * 2, mask=split < count, other=float("-inf"))
    total = tl.load(sums_ptr + at * 2 + 1, mask=split < count, other=0.0)
    top = tl.max(largest, 0)
    reference = tl.where(top == float("-inf"), 0.0, top)
    share = tl.math.exp2(largest - reference)
    whole = tl.sum(tl.where(share > 0.0, total * share, 0.0), 0)
    used = (split < count) & (share > 0.0)
    part = tl.load(part_ptr + at[:, None] * D + column[None, :], mask=used[:, None] & (column < D)[None, :], other=0.0)
    out = tl.sum(part * share[:, None], 0)
    some = whole > 0.0
    whole = tl.where(some, whole, 1.0)
    lse = tl.where(some, (reference + tl.math.log2(whole)) * 0.6931471805599453, float("-inf"))
    head_q = head * GROUP + row % GROUP
    query = row // GROUP
    tl.store(lse_ptr + (batch * heads * GROUP + head_q) * sq + query, lse)
    out = tl.where(some, out / whole, 0.0)
    if SINKS:
        sink = tl.load(sinks_ptr + head_q).to(tl.float32)
        out = out / (1.0 + tl.exp(sink - lse))
        out = tl.where(some, out, 0.0)
    target = out_ptr + ((batch * sq + query) * heads * GROUP + head_q) * D + column
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=column < D)


_ATTEND, _MERGE = Launcher(_attend, num_stages=3), Launcher(_merge)
