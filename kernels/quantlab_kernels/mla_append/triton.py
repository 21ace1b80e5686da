"""One launch: a program takes a few tokens from the rows of the projection to codes in their slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.latent import CLIPS
from quantlab_kernels.common.triton_fp8 import largest_magnitude
from quantlab_kernels.common.triton_launch import Launcher, begin
from quantlab_kernels.kv_append.triton import KINDS, _eight_bits, _rounded

if TYPE_CHECKING:
    from quantlab_kernels.mla_append.op import Problem

HEADS = 16  # of one program that turns queries
TOKENS = 8  # of one program that turns those of a prompt


def supports(problem: Problem) -> str | None:
    """Rows of a power of two of channels, from sm_80 on."""
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if any(n < 16 or n & (n - 1) for n in (problem.rank, problem.rope)):
        return f"{problem.rank} latent channels and {problem.rope} of the position, needs powers of two from 16 on"
    return None


def launch(
    problem: Problem, latent: Tensor, rope: Tensor, codes: Tensor, kept: Tensor, scale: Tensor | None,
    length: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, slots: Tensor | None, eps: float,
    interleaved: bool,
) -> None:  # fmt: skip
    """Write codes, scales and position parts. Absent tensors are passed as `length`, which nothing then reads."""
    p, native = problem, problem.sm >= 89
    plain = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn and not native else codes
    tensors = (
        latent, rope, plain, kept, *(length if t is None else t for t in (scale, norm, cos, sin, slots)), length
    )  # fmt: skip
    numbers = (
        p.tokens, codes.shape[1], eps, *latent.stride(), *rope.stride(), *_strides(cos), *_strides(sin),
        codes.stride(0), kept.stride(0), 0 if scale is None else scale.stride(0),
    )  # fmt: skip
    tokens = 1 if p.tokens * p.batch <= 1024 else 4
    constants = (
        p.rank, p.rope, tokens, KINDS[p.code], norm is not None, cos is not None, interleaved, slots is not None,
        native, *CLIPS,
    )  # fmt: skip
    _LAUNCH((triton.cdiv(p.tokens, tokens), p.batch), tensors, numbers, constants, 1 if tokens == 1 else 4)


def launch_step(
    problem: Problem, query: Tensor, latent: Tensor, rope: Tensor, codes: Tensor, kept: Tensor, scale: Tensor | None,
    length: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float, interleaved: bool,
    kept_interleaved: bool, out: Tensor,
) -> None:  # fmt: skip
    """As `launch` for one token of each sequence, and turn queries into out [B, 1, H, R]; a program for the token and
    more for `HEADS` heads each."""
    p, native = problem, problem.sm >= 89
    plain = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn and not native else codes
    tensors = (
        query, latent, rope, cos, sin, length if norm is None else norm, plain, kept,
        length if scale is None else scale, length, out,
    )  # fmt: skip
    columns = [n for x in (cos, sin) for n in (0 if x.shape[0] == 1 else x.stride(0), x.stride(2))]
    numbers = (
        p.heads, codes.shape[1], eps, query.stride(0), *query.stride()[2:], latent.stride(0), latent.stride(2),
        rope.stride(0), rope.stride(2), *columns, codes.stride(0), kept.stride(0),
        0 if scale is None else scale.stride(0),
    )  # fmt: skip
    constants = (
        p.rank, p.rope, HEADS, KINDS[p.code], norm is not None, interleaved, kept_interleaved, native, *CLIPS
    )  # fmt: skip
    _STEP((1 + triton.cdiv(p.heads, HEADS), p.batch), tensors, numbers, constants, 4 if p.code == "int4" else 1)


def launch_turn(
    problem: Problem, query: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, kept_interleaved: bool
) -> None:
    """Turn queries [B, S, H, R] and keys [B, S, R] where they are; a program for some tokens' keys, or for heads."""
    tokens = 1 if problem.tokens * problem.batch <= 256 else TOKENS
    strides = [n for x in (cos, sin) for n in (*_strides(x), x.stride(2))]
    numbers = problem.tokens, problem.heads, *query.stride(), *rope.stride(), *strides
    grid = (triton.cdiv(problem.tokens, tokens), problem.batch, 1 + triton.cdiv(problem.heads, HEADS))
    constants = problem.rope, HEADS, tokens, interleaved, kept_interleaved
    _TURN(grid, (query, rope, cos, sin), numbers, constants, 2)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Of the sequence and the token; one row of positions serves every sequence."""
    return (0, 0) if tensor is None else (0 if tensor.shape[0] == 1 else tensor.stride(0), tensor.stride(1))


@triton.jit
def _level(x, scale):
    """The nearest odd number from -15 to 15 to x / scale, as 0 .. 15."""
    half = (tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)) + 15.0) * 0.5
    half = tl.where(half == half, half, 0.0)
    return tl.minimum(tl.maximum(_rounded(half), 0.0), 15.0)


@triton.jit
def _tried(low, high, amax, clip, best, least):
    """The better of a row's best scale so far and another clip's, with its squared error."""
    scale = tl.maximum(amax * clip, 8.673617379884035e-19)
    miss_low = (2.0 * _level(low, scale) - 15.0) * scale[:, None] - low
    miss_high = (2.0 * _level(high, scale) - 15.0) * scale[:, None] - high
    error = tl.sum(miss_low * miss_low, 1) + tl.sum(miss_high * miss_high, 1)
    return tl.where(error < least, scale, best), tl.minimum(error, least)


@triton.jit
def _four_bits(
    codes_ptr, low, high, at, mask, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
    C4: tl.constexpr,
):  # fmt: skip
    """Stores a row's codes with the best of its clips and returns the scale."""
    amax = tl.maximum(largest_magnitude(low, 1), largest_magnitude(high, 1))
    least = tl.full(amax.shape, float("inf"), tl.float32)
    scale = tl.maximum(amax * (C0 / 15), 8.673617379884035e-19)
    scale, least = _tried(low, high, amax, C0 / 15, scale, least)
    scale, least = _tried(low, high, amax, C1 / 15, scale, least)
    scale, least = _tried(low, high, amax, C2 / 15, scale, least)
    scale, least = _tried(low, high, amax, C3 / 15, scale, least)
    scale, least = _tried(low, high, amax, C4 / 15, scale, least)
    byte = _level(low, scale).to(tl.int32) | (_level(high, scale).to(tl.int32) << 4)
    tl.store(codes_ptr + at, byte.to(tl.uint8), mask=mask)
    return scale


@triton.jit
def _write_latents(
    at, codes_ptr, scale_ptr, norm_ptr, l_column, inside, keep, row, slot, eps, codes_row, scale_row, L: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, NATIVE: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    C3: tl.constexpr, C4: tl.constexpr,
):  # fmt: skip
    """Latents of tokens that begin at `at`, normalized and quantized, into their slots."""
    HALF: tl.constexpr = L // 2
    half = tl.arange(0, HALF)
    at = at[:, None] + half[None, :] * l_column
    low = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    high = tl.load(at + HALF * l_column, mask=inside[:, None], other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / L
        factor = tl.math.rsqrt(mean + eps)[:, None]
        low = low * factor * tl.load(norm_ptr + half).to(tl.float32)[None, :]
        high = high * factor * tl.load(norm_ptr + HALF + half).to(tl.float32)[None, :]
    mask = keep[:, None] & (half >= 0)[None, :]
    if KIND == 2:
        at = (row * codes_row + slot * HALF)[:, None] + half[None, :]
        scale = _four_bits(codes_ptr, low, high, at, mask, C0, C1, C2, C3, C4)
        tl.store(scale_ptr + row * scale_row + slot, scale, mask=keep)
    else:
        at = (row * codes_row + slot * L)[:, None] + half[None, :]
        if KIND == 3:
            tl.store(codes_ptr + at, low.to(codes_ptr.dtype.element_ty), mask=mask)
            tl.store(codes_ptr + at + HALF, high.to(codes_ptr.dtype.element_ty), mask=mask)
        else:
            limit: tl.constexpr = 448.0 if KIND == 0 else 127.0
            amax = tl.maximum(largest_magnitude(low, 1), largest_magnitude(high, 1))
            scale = tl.maximum(
                tl.math.div_rn(amax, tl.full(amax.shape, limit, tl.float32)), 8.673617379884035e-19
            )  # fmt: skip
            scale = tl.where(amax > 0.0, scale, 1.0)
            _eight_bits(codes_ptr, low, high, scale, at, HALF, mask, KIND == 0, NATIVE)
            tl.store(scale_ptr + row * scale_row + slot, scale, mask=keep)


@triton.jit
def _halves(at, column, mask, TURN: tl.constexpr, PAIRS: tl.constexpr):
    """The channels that are turned together of rows that begin at `at` [N, 1]; PAIRS: they lie side by side there, else
    TURN apart."""
    if PAIRS:
        row = tl.load(at + tl.arange(0, 2 * TURN)[None, :] * column, mask=mask, other=0.0).to(tl.float32)
        one, two = tl.split(tl.reshape(row, (row.shape[0], TURN, 2)))
    else:
        turn = tl.arange(0, TURN)[None, :]
        one = tl.load(at + turn * column, mask=mask, other=0.0).to(tl.float32)
        two = tl.load(at + (turn + TURN) * column, mask=mask, other=0.0).to(tl.float32)
    return one, two


@triton.jit
def _kernel(
    latent_ptr, rope_ptr, codes_ptr, kept_ptr, scale_ptr, norm_ptr, cos_ptr, sin_ptr, slots_ptr, length_ptr, tokens,
    capacity, eps, l_batch, l_token, l_column, r_batch, r_token, r_column, cos_batch, cos_token, sin_batch, sin_token,
    codes_row, kept_row, scale_row,
    L: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, SLOTS: tl.constexpr, NATIVE: tl.constexpr, C0: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, C4: tl.constexpr,
):  # fmt: skip
    TURN: tl.constexpr = R // 2
    batch = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < tokens
    if SLOTS:
        place = tl.load(slots_ptr + batch * tokens + token, mask=inside, other=-1)
        keep = inside & (place >= 0)
        row, slot = tl.where(keep, place // capacity, 0), tl.where(keep, place % capacity, 0)
    else:
        position = tl.load(length_ptr + batch).to(tl.int64) - tokens + token
        keep = inside & (position >= 0) & (position < capacity)
        row, slot = token * 0 + batch, tl.where(keep, position, 0)

    _write_latents(
        latent_ptr + batch * l_batch + token * l_token, codes_ptr, scale_ptr, norm_ptr, l_column, inside, keep, row,
        slot, eps, codes_row, scale_row, L, KIND, NORM, NATIVE, C0, C1, C2, C3, C4,
    )  # fmt: skip

    turn = tl.arange(0, TURN)
    at = rope_ptr + (batch * r_batch + token * r_token)[:, None]
    one, two = _halves(at, r_column, inside[:, None], TURN, INTERLEAVED)
    if ROTARY:
        cos_at = cos_ptr + (batch * cos_batch + token * cos_token)[:, None] + turn[None, :]
        sin_at = sin_ptr + (batch * sin_batch + token * sin_token)[:, None] + turn[None, :]
        cos = tl.load(cos_at, mask=inside[:, None], other=0.0).to(tl.float32)
        sin = tl.load(sin_at, mask=inside[:, None], other=0.0).to(tl.float32)
        cos_two = tl.load(cos_at + TURN, mask=inside[:, None], other=0.0).to(tl.float32)
        sin_two = tl.load(sin_at + TURN, mask=inside[:, None], other=0.0).to(tl.float32)
        one, two = one * cos - two * sin, two * cos_two + one * sin_two
    at = kept_ptr + (row * kept_row + slot * R)[:, None] + turn[None, :]
    mask = keep[:, None] & (turn >= 0)[None, :]
    tl.store(at, one.to(kept_ptr.dtype.element_ty), mask=mask)
    tl.store(at + TURN, two.to(kept_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turned_rows(
    at, cos_ptr, sin_ptr, column, cos_column, sin_column, mask, out, out_column, out_mask, TURN: tl.constexpr,
    PAIRS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Rows that begin at `at` [N, 1], turned by angles of one position, to `out` [N, 1]; PAIRS, KEPT: channels that
    belong together lie side by side there, else TURN apart."""
    turn = tl.arange(0, TURN)[None, :]
    cos = tl.load(cos_ptr + turn * cos_column).to(tl.float32)
    sin = tl.load(sin_ptr + turn * sin_column).to(tl.float32)
    one, two = _halves(at, column, mask, TURN, PAIRS)
    first, second = one * cos - two * sin, two * cos + one * sin
    kind = out.dtype.element_ty
    tl.debug_barrier()  # all threads have read rows that are turned where they are
    if KEPT:
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * TURN))
        tl.store(out + tl.arange(0, 2 * TURN)[None, :] * out_column, both.to(kind), mask=out_mask)
    else:
        tl.store(out + turn * out_column, first.to(kind), mask=out_mask)
        tl.store(out + (turn + TURN) * out_column, second.to(kind), mask=out_mask)


@triton.jit
def _step_kernel(
    query_ptr, latent_ptr, rope_ptr, cos_ptr, sin_ptr, norm_ptr, codes_ptr, kept_ptr, scale_ptr, length_ptr, out_ptr,
    heads, capacity, eps, q_batch, q_head, q_column, l_batch, l_column, r_batch, r_column, cos_batch, cos_column,
    sin_batch, sin_column, codes_row, kept_row, scale_row,
    L: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, PAIRS: tl.constexpr,
    KEPT: tl.constexpr, NATIVE: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
    C4: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    TURN: tl.constexpr = R // 2
    batch = tl.program_id(1).to(tl.int64)
    cos_ptr += batch * cos_batch
    sin_ptr += batch * sin_batch
    if tl.program_id(0) == 0:
        row = batch + tl.arange(0, 1)
        slot = tl.load(length_ptr + row).to(tl.int64)
        inside, keep = row >= 0, (slot >= 0) & (slot < capacity)
        tl.debug_barrier()  # all threads have read the length
        tl.store(length_ptr + row, (slot + 1).to(tl.int32))
        slot = tl.where(keep, slot, 0)
        _write_latents(
            latent_ptr + row * l_batch, codes_ptr, scale_ptr, norm_ptr, l_column, inside, keep, row, slot, eps,
            codes_row, scale_row, L, KIND, NORM, NATIVE, C0, C1, C2, C3, C4,
        )  # fmt: skip
        _turned_rows(
            rope_ptr + (row * r_batch)[:, None], cos_ptr, sin_ptr, r_column, cos_column, sin_column, inside[:, None],
            kept_ptr + (row * kept_row + slot * R)[:, None], 1, keep[:, None], TURN, PAIRS, KEPT,
        )  # fmt: skip
    else:
        head = ((tl.program_id(0) - 1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        mask = head < heads
        _turned_rows(
            query_ptr + batch * q_batch + head * q_head, cos_ptr, sin_ptr, q_column, cos_column, sin_column, mask,
            out_ptr + (batch * heads + head) * R, 1, mask, TURN, PAIRS, KEPT,
        )  # fmt: skip


@triton.jit
def _turn_kernel(
    query_ptr, rope_ptr, cos_ptr, sin_ptr, tokens, heads, q_batch, q_token, q_head, q_column, r_batch, r_token,
    r_column, cos_batch, cos_token, cos_column, sin_batch, sin_token, sin_column, R: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, KEPT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Keys of TOKENS tokens, or HEADS heads of their queries."""
    begin(EARLY)
    TURN: tl.constexpr = R // 2
    batch = tl.program_id(1).to(tl.int64)
    cos_ptr += batch * cos_batch
    sin_ptr += batch * sin_batch
    for i in range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        place = tl.minimum(token, tokens - 1)
        cos_at, sin_at = cos_ptr + place * cos_token, sin_ptr + place * sin_token
        if tl.program_id(2) == 0:
            one = tl.arange(0, 1)[:, None]
            key, there = rope_ptr + batch * r_batch + token * r_token + one, (one + token) < tokens
            _turned_rows(
                key, cos_at, sin_at, r_column, cos_column, sin_column, there, key, r_column, there, TURN, PAIRS, KEPT
            )
        else:
            head = ((tl.program_id(2) - 1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
            query = query_ptr + batch * q_batch + token * q_token + head * q_head
            mask = (head < heads) & (head * 0 + token < tokens)
            _turned_rows(
                query, cos_at, sin_at, q_column, cos_column, sin_column, mask, query, q_column, mask, TURN, PAIRS, KEPT
            )


_LAUNCH = Launcher(_kernel)
_STEP = Launcher(_step_kernel, early=True)
_TURN = Launcher(_turn_kernel, early=True)
