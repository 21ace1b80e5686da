"""One launch for queries and keys: a program turns a few heads of a few tokens, cosines and sines are read once for
them. Both halves of a head are loaded together, so that nothing is concatenated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.triton_launch import Launcher

if TYPE_CHECKING:
    from quantlab_kernels.rope.op import Problem

HEADS = 8  # of one program


@dataclass(frozen=True)
class Config:
    """tokens of one program; half, rest: channels that turn, halved, and those that do not, up to powers of two."""

    half: int
    rest: int
    tokens: int = 2
    num_warps: int = 1


def supports(problem: Problem) -> str | None:
    """Everything from sm_80 on."""
    return None if problem.sm >= 80 else f"needs sm_80 or newer, the GPU is sm_{problem.sm}"


@remembered
def config(problem: Problem) -> Config:
    """Two tokens and one warp: best, or within 6 % of it, from one token to 16384 on an H200."""
    return Config(triton.next_power_of_2(max(problem.r // 2, 1)), triton.next_power_of_2(max(problem.d - problem.r, 1)))


def launch(
    problem: Problem, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, config: Config
) -> None:
    """Fill q_out [B, Hq, S, D] and k_out [B, Hkv, S, D]; operands may have any strides."""
    batch, q_heads, length, d = q.shape
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    half = problem.r // 2
    grid = (
        -(-length // config.tokens), batch, -(-q_heads // HEADS) + -(-k.shape[1] // HEADS)
    )  # fmt: skip
    numbers = (
        length, q_heads, k.shape[1], *q.stride(), *k.stride(), *cos.stride(), *sin.stride(), *q_out.stride()[:3],
        *k_out.stride()[:3], half, d - problem.r,
    )  # fmt: skip
    constants = config.half, config.rest, config.tokens, HEADS
    _LAUNCH(grid, (q, k, cos, sin, q_out, k_out), numbers, constants, config.num_warps)


@triton.jit
def _turn(x_ptr, out_ptr, cos, sin, at, out_at, column_stride, channel, half, mask):
    """Both halves of [TOKENS, HEADS, channel]; cos and sin are pairs of the halves' [TOKENS, channel]."""
    low = tl.load(x_ptr + at + channel * column_stride, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + at + (channel + half) * column_stride, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # Both products are rounded to the dtype before they are added, which is what torch does.
    first = (low * cos[0]).to(dtype).to(tl.float32) + (-high * sin[0]).to(dtype).to(tl.float32)
    second = (high * cos[1]).to(dtype).to(tl.float32) + (low * sin[1]).to(dtype).to(tl.float32)
    tl.store(out_ptr + out_at + channel, first.to(dtype), mask=mask)
    tl.store(out_ptr + out_at + channel + half, second.to(dtype), mask=mask)


@triton.jit
def _kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, length, q_heads, k_heads,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column,
    cos_batch, cos_row, cos_column, sin_batch, sin_row, sin_column,
    q_out_batch, q_out_head, q_out_row, k_out_batch, k_out_head, k_out_row, half, rest,
    HALF: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    wide_row = row.to(tl.int64)
    channel = tl.arange(0, HALF)
    known = (row[:, None] < length) & (channel[None, :] < half)
    cos_at = cos_ptr + batch * cos_batch + wide_row[:, None] * cos_row + channel[None, :] * cos_column
    sin_at = sin_ptr + batch * sin_batch + wide_row[:, None] * sin_row + channel[None, :] * sin_column
    cos = (
        tl.load(cos_at, mask=known, other=0.0).to(tl.float32)[:, None, :],
        tl.load(cos_at + half * cos_column, mask=known, other=0.0).to(tl.float32)[:, None, :],
    )
    sin = (
        tl.load(sin_at, mask=known, other=0.0).to(tl.float32)[:, None, :],
        tl.load(sin_at + half * sin_column, mask=known, other=0.0).to(tl.float32)[:, None, :],
    )
    q_blocks = tl.cdiv(q_heads, HEADS)
    block = tl.program_id(2)
    of_q = block < q_blocks
    head = tl.where(of_q, block, block - q_blocks) * HEADS + tl.arange(0, HEADS)
    heads = tl.where(of_q, q_heads, k_heads)
    wide_head = head.to(tl.int64)[None, :, None]
    wide_row = wide_row[:, None, None]
    inside = (row[:, None, None] < length) & (head[None, :, None] < heads)
    mask = inside & (channel[None, None, :] < half)
    other = tl.arange(0, REST)[None, None, :]
    pass_mask = inside & (other < rest)
    if of_q:
        at = batch * q_batch + wide_head * q_head + wide_row * q_row
        out_at = batch * q_out_batch + wide_head * q_out_head + wide_row * q_out_row
        _turn(q_ptr, q_out_ptr, cos, sin, at, out_at, q_column, channel[None, None, :], half, mask)
        if rest > 0:
            passed = tl.load(q_ptr + at + (other + 2 * half) * q_column, mask=pass_mask)
            tl.store(q_out_ptr + out_at + other + 2 * half, passed, mask=pass_mask)
    else:
        at = batch * k_batch + wide_head * k_head + wide_row * k_row
        out_at = batch * k_out_batch + wide_head * k_out_head + wide_row * k_out_row
        _turn(k_ptr, k_out_ptr, cos, sin, at, out_at, k_column, channel[None, None, :], half, mask)
        if rest > 0:
            passed = tl.load(k_ptr + at + (other + 2 * half) * k_column, mask=pass_mask)
            tl.store(k_out_ptr + out_at + other + 2 * half, passed, mask=pass_mask)


# Products must be rounded before they are added: no fused multiply-add.
_LAUNCH = Launcher(_kernel, enable_fp_fusion=False)
