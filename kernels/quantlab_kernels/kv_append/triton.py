"""One launch: a program takes a few tokens of one head, keys then values, from the rows to codes in their slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.triton_fp8 import largest_magnitude, store_codes
from quantlab_kernels.common.triton_launch import Launcher

if TYPE_CHECKING:
    from quantlab_kernels.kv_append.op import Problem

KINDS = {"e4m3": 0, "int8": 1, "int4": 2, "float": 3}


def supports(problem: Problem) -> str | None:
    """Heads of an even number of channels, which come as two halves, from sm_80 on."""
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    return f"heads of {problem.d} channels, needs an even number" if problem.d % 2 else None


def launch(
    problem: Problem, k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor | None, v_codes: Tensor,
    v_scale: Tensor | None, k_near: Tensor | None, v_near: Tensor | None, k_mean: Tensor | None,
    k_channel: Tensor | None, length: Tensor, start: Tensor | None, slots: Tensor | None, first: int, ring: bool,
) -> None:  # fmt: skip
    """Write codes, scales and near tokens. Absent tensors are passed as `length`, which nothing then reads."""
    p, native = problem, problem.sm >= 89
    absent = length
    plain = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn and not native else t for t in (k_codes, v_codes)]
    mean, channel, near_k, near_v, ks, vs = (
        absent if t is None else t for t in (k_mean, k_channel, k_near, v_near, k_scale, v_scale)
    )
    tensors = (
        k, v, *plain, ks, vs, near_k, near_v, mean, channel, length, absent if start is None else start,
        absent if slots is None else slots,
    )  # fmt: skip
    newest = 0 if k_near is None else k_near.shape[2] - first
    numbers = (
        p.tokens, p.heads, k_codes.shape[2], first, newest, *k.stride(), *v.stride(), *k_codes.stride()[:3],
        *v_codes.stride()[:3], *_strides(k_scale), *_strides(v_scale), *_strides(k_near), *_strides(v_near),
        *_strides(k_mean, 2), *_strides(k_channel, 2),
    )  # fmt: skip
    tokens = 1 if p.tokens * p.batch * p.heads <= 4096 else 8
    constants = (
        p.d, triton.next_power_of_2(max(p.d // 2, 16)), tokens, KINDS[p.key], KINDS[p.value], k_mean is not None,
        k_channel is not None, start is not None, slots is not None, k_near is not None, ring, native,
    )  # fmt: skip
    grid = triton.cdiv(p.tokens, tokens), p.heads, p.batch
    _LAUNCH(grid, tensors, numbers, constants, 1 if tokens == 1 else 4)


def _strides(tensor: Tensor | None, count: int = 3) -> tuple[int, ...]:
    """The first strides; that of an extent of 1 is 0, so that it serves every index."""
    if tensor is None:
        return (0,) * count
    return tuple(0 if tensor.shape[i] == 1 and count == 2 else tensor.stride(i) for i in range(count))


@triton.jit
def _rounded(x):
    """To the nearest integer, ties to even; |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _eight_bits(codes_ptr, low, high, scale, at, half, mask, E4M3: tl.constexpr, NATIVE: tl.constexpr):
    low = tl.math.div_rn(low, tl.broadcast_to(scale[:, None], low.shape))
    high = tl.math.div_rn(high, tl.broadcast_to(scale[:, None], high.shape))
    if E4M3:
        store_codes(codes_ptr + at, low, mask, NATIVE)
        store_codes(codes_ptr + at + half, high, mask, NATIVE)
    else:
        low, high = tl.where(low == low, low, 0.0), tl.where(high == high, high, 0.0)
        low = tl.minimum(tl.maximum(_rounded(low), -128.0), 127.0)
        high = tl.minimum(tl.maximum(_rounded(high), -128.0), 127.0)
        tl.store(codes_ptr + at, low.to(tl.int8), mask=mask)
        tl.store(codes_ptr + at + half, high.to(tl.int8), mask=mask)


@triton.jit
def _four_bits(codes_ptr, scale_ptr, low, high, at, scale_at, keep, mask):
    least = tl.min(tl.minimum(tl.where(mask, low, float("inf")), tl.where(mask, high, float("inf"))), 1)
    most = tl.max(tl.maximum(tl.where(mask, low, float("-inf")), tl.where(mask, high, float("-inf"))), 1)
    zero = tl.where(keep, least, 0.0).to(tl.float16)
    span = tl.where(keep, most, 0.0) - zero.to(tl.float32)
    scale = tl.maximum(tl.math.div_rn(span, tl.full(span.shape, 15.0, tl.float32)), 5.9604644775390625e-08)
    scale = scale.to(tl.float16)
    divisor, base = scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None]
    low = tl.math.div_rn(low - base, tl.broadcast_to(divisor, low.shape))
    high = tl.math.div_rn(high - base, tl.broadcast_to(divisor, high.shape))
    low = tl.minimum(tl.maximum(_rounded(tl.where(low == low, low, 0.0)), 0.0), 15.0)
    high = tl.minimum(tl.maximum(_rounded(tl.where(high == high, high, 0.0)), 0.0), 15.0)
    byte = low.to(tl.int32) | (high.to(tl.int32) << 4)
    tl.store(codes_ptr + at, byte.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + scale_at, scale, mask=keep)
    tl.store(scale_ptr + scale_at + 1, zero, mask=keep)


@triton.jit
def _write(
    codes_ptr, scale_ptr, low, high, at, scale_at, keep, channel, HALF: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows [TOKENS, 2 halves] as codes and scales where `keep`."""
    mask = keep[:, None] & (channel < HALF)[None, :]
    at = at[:, None] + channel[None, :]
    if KIND == 3:
        tl.store(codes_ptr + at, low.to(codes_ptr.dtype.element_ty), mask=mask)
        tl.store(codes_ptr + at + HALF, high.to(codes_ptr.dtype.element_ty), mask=mask)
    elif KIND == 2:
        _four_bits(codes_ptr, scale_ptr, low, high, at, scale_at, keep, mask)
    else:
        limit: tl.constexpr = 448.0 if KIND == 0 else 127.0
        amax = tl.maximum(largest_magnitude(low, 1), largest_magnitude(high, 1))
        scale = tl.maximum(tl.math.div_rn(amax, tl.full(amax.shape, limit, tl.float32)), 1.1754943508222875e-38)
        scale = tl.where(amax > 0.0, scale, 1.0)
        _eight_bits(codes_ptr, low, high, scale, at, HALF, mask, KIND == 0, NATIVE)
        tl.store(scale_ptr + scale_at, scale, mask=keep)


@triton.jit
def _near(near_ptr, low, high, at, keep, channel, HALF: tl.constexpr):
    mask = keep[:, None] & (channel < HALF)[None, :]
    at = at[:, None] + channel[None, :]
    tl.store(near_ptr + at, low.to(near_ptr.dtype.element_ty), mask=mask)
    tl.store(near_ptr + at + HALF, high.to(near_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    k_ptr, v_ptr, k_codes_ptr, v_codes_ptr, k_scale_ptr, v_scale_ptr, k_near_ptr, v_near_ptr, mean_ptr, channel_ptr,
    length_ptr, start_ptr, slots_ptr, tokens, heads, capacity, first, newest,
    k_batch, k_head, k_token, k_column, v_batch, v_head, v_token, v_column,
    kc_row, kc_head, kc_slot, vc_row, vc_head, vc_slot, ks_row, ks_head, ks_slot, vs_row, vs_head, vs_slot,
    kn_row, kn_head, kn_slot, vn_row, vn_head, vn_slot, mean_batch, mean_head, channel_batch, channel_head,
    D: tl.constexpr, HALF_P: tl.constexpr, TOKENS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    MEAN: tl.constexpr, CHANNEL: tl.constexpr, START: tl.constexpr, SLOTS: tl.constexpr, NEAR: tl.constexpr,
    RING: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    channel = tl.arange(0, HALF_P)
    inside = token < tokens
    mask = inside[:, None] & (channel < HALF)[None, :]
    length = tl.load(length_ptr + batch).to(tl.int64)
    position = length - tokens + token
    if SLOTS:
        place = tl.load(slots_ptr + batch * tokens + token, mask=inside, other=-1)
        keep = inside & (place >= 0)
        row, slot = tl.where(keep, place // capacity, 0), tl.where(keep, place % capacity, 0)
    elif RING:
        keep = inside & (position >= 0) & (position >= length - capacity)
        row, slot = token * 0 + batch, tl.where(keep, position % capacity, 0)
    else:
        keep = inside & (position >= 0) & (position < capacity)
        row, slot = token * 0 + batch, tl.where(keep, position, 0)

    at = k_ptr + batch * k_batch + head * k_head + token[:, None] * k_token + channel[None, :] * k_column
    k_low, k_high = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF * k_column, mask=mask, other=0.0)
    at = v_ptr + batch * v_batch + head * v_head + token[:, None] * v_token + channel[None, :] * v_column
    v_low, v_high = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF * v_column, mask=mask, other=0.0)
    if NEAR:
        start = tl.zeros((), tl.int64)
        if START:
            start = tl.load(start_ptr + batch).to(tl.int64)
        rank = position - start
        early = inside & (rank >= 0) & (rank < first)
        late = inside & (rank >= first) & (position >= length - newest) & (position >= 0)
        near = tl.where(early, rank, first + position % tl.maximum(newest, 1))
        near = tl.where(early | late, near, 0)
        _near(k_near_ptr, k_low, k_high, batch * kn_row + head * kn_head + near * kn_slot, early | late, channel, HALF)
        _near(v_near_ptr, v_low, v_high, batch * vn_row + head * vn_head + near * vn_slot, early | late, channel, HALF)
    low, high = k_low.to(tl.float32), k_high.to(tl.float32)
    known = channel < HALF
    if MEAN:
        at = mean_ptr + batch * mean_batch + head * mean_head + channel
        low -= tl.load(at, mask=known, other=0.0)[None, :]
        high -= tl.load(at + HALF, mask=known, other=0.0)[None, :]
    if CHANNEL:
        at = channel_ptr + batch * channel_batch + head * channel_head + channel
        low = tl.math.div_rn(low, tl.broadcast_to(tl.load(at, mask=known, other=1.0)[None, :], low.shape))
        high = tl.math.div_rn(high, tl.broadcast_to(tl.load(at + HALF, mask=known, other=1.0)[None, :], high.shape))
    # Tokens beyond the chunk hold -mean now, in rows of their own, which are not written.
    _write(
        k_codes_ptr, k_scale_ptr, low, high, row * kc_row + head * kc_head + slot * kc_slot,
        row * ks_row + head * ks_head + slot * ks_slot, keep, channel, HALF, KEY, NATIVE,
    )  # fmt: skip
    _write(
        v_codes_ptr, v_scale_ptr, v_low.to(tl.float32), v_high.to(tl.float32),
        row * vc_row + head * vc_head + slot * vc_slot, row * vs_row + head * vs_head + slot * vs_slot, keep, channel,
        HALF, VALUE, NATIVE,
    )  # fmt: skip


_LAUNCH = Launcher(_kernel)
