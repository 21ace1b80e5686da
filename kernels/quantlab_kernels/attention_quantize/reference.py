"""The definition of what 8-bit attention reads, its inverse, and the CPU implementation.

Queries and keys: `x R`, R an orthonormal Hadamard matrix with fixed random signs, spreads a channel's outliers over
all (FlashAttention-3, section 3.3). The mean of the keys is subtracted before (SageAttention, section 4.2): it adds the
same number to all scores of a query, which softmax does not see. That number, `q_shift`, is kept for what does see it:
soft caps, sinks and the log-sum-exp. Values are centred and rotated too; attention weights add up to 1, so the mean
comes back by one addition, and one scale for all channels of 128 keys then serves as well as one per channel.

Both means are those of at most 256 tokens. Any vector would do, the better ones make smaller codes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from quantlab_kernels.rope.reference import rotate

BLOCK = 128  # keys of a block
GROUPS = 4  # key scales of a block: one for each thread of a quad of the tensor core's accumulator
SAMPLES = 256  # tokens that a mean is taken of
LIMIT = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Rotary(NamedTuple):
    """A rotary embedding of queries and keys.

    cos, sin     [B or 1, S, R] in the inputs' dtype; channels from R on pass through
    interleaved  channels 2 i and 2 i + 1 turn together, else i and i + R / 2
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def embed(self, x: Tensor) -> Tensor:
        """x [B, H, S, D] turned, in its own dtype: both products and their sum are rounded, as `rope` does."""
        if not self.interleaved:
            return rotate(x, self.cos, self.sin)
        turned, rest = x[..., : self.cos.shape[-1]], x[..., self.cos.shape[-1] :]
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        return torch.cat((turned * self.cos[:, None] + swapped * self.sin[:, None], rest), -1)


@functools.cache
def signs(d: int) -> Tensor:
    """[d] of ±1: fixed, and without structure that a model's weights could share."""
    state, values = 2463534242, []
    for _ in range(d):  # xorshift32 (Marsaglia 2003)
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        values.append(1.0 if state & 0x10000 else -1.0)
    return torch.tensor(values, dtype=torch.float64)


@functools.cache
def hadamard(d: int) -> Tensor:
    """[d, d] of 0 and ±1, ``diag(signs) H``; H is block-diagonal where d is no power of two (80: five of 16)."""
    size = d & -d
    block = torch.ones(1, 1, dtype=torch.float64)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return signs(d)[:, None] * torch.block_diag(*[block] * (d // size))


def rotation(d: int) -> Tensor:
    """[d, d] float64 orthonormal: `hadamard` over the root of its block size."""
    return hadamard(d) / (d & -d) ** 0.5


@functools.cache
def key_order() -> Tensor:
    """[128] int64: at place i of a block of values lies key ``key_order()[i]``.

    An accumulator thread t of a quad holds the scores of keys 8 j + 2 t + {0, 1}; as operand of the next product it
    holds places 4 t .. 4 t + 3 and 16 + 4 t .. 16 + 4 t + 3 of every 32. Values stored in this order let the kernel
    use its registers as they are.
    """
    place = torch.arange(BLOCK)
    within = place % 32
    thread, pair, half = within % 16 // 4, within % 4 // 2, within // 16
    return place // 32 * 32 + half * 16 + pair * 8 + thread * 2 + place % 2


def key_group() -> Tensor:
    """[128] int64: which of the four scales of its block a key has."""
    return torch.arange(BLOCK) // 2 % GROUPS


def valid(key_range: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """[B, S] bool: the tokens inside ``key_range`` [B, 2]."""
    if key_range is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    token = torch.arange(length, device=device)
    return (token >= key_range[:, :1]) & (token < key_range[:, 1:])


def sampled_mean(x: Tensor, key_range: Tensor | None) -> Tensor:
    """[B, H, D] mean of at most `SAMPLES` evenly spaced valid tokens of x [B, H, S, D]; 0 where there is none."""
    batch, heads, length, d = x.shape
    if length == 0:
        return x.new_zeros(batch, heads, d)
    bounds = torch.tensor([[0, length]], device=x.device).expand(batch, 2) if key_range is None else key_range
    start, count = bounds[:, :1].clamp(0, length), (bounds[:, 1:] - bounds[:, :1]).clamp(0, length)
    samples = count.clamp(max=SAMPLES)
    i = torch.arange(SAMPLES, device=x.device)
    taken = i < samples
    token = torch.where(taken, start + i * count // samples.clamp(min=1), 0).clamp(max=max(length - 1, 0))
    index = token[:, None, :, None].expand(batch, heads, SAMPLES, d)
    values = torch.where(taken[:, None, :, None], x.gather(2, index), 0.0)
    return values.sum(2) / samples.clamp(min=1)[:, None].to(x.dtype)


def _codes(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of x and the scale ``amax / limit`` (1 where amax is 0); amax broadcasts to x."""
    scale = torch.where(amax > 0, amax / LIMIT[dtype], 1.0)
    quotient = x / scale
    codes = quotient.round().clamp(-127, 127) if dtype == torch.int8 else quotient.clamp(-448, 448)
    return codes.to(dtype), scale.to(torch.float32)


def _blocks(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, H, NB, 128, D], zeros at the end."""
    batch, heads, length, d = x.shape
    count = -(-length // BLOCK)
    return torch.nn.functional.pad(x, (0, 0, 0, count * BLOCK - length)).view(batch, heads, count, BLOCK, d)


def _quantize_keys(k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [B, H, S, D] and scales [B, H, NB, 4] of centred and rotated keys."""
    blocks = _blocks(k)
    grouped = blocks.unflatten(3, (BLOCK // 8, GROUPS, 2))
    amax = grouped.abs().amax((3, 5, 6))
    per_key = amax.to(k.dtype)[..., key_group().to(k.device)][..., None]
    codes, _ = _codes(blocks, per_key, dtype)
    _, scale = _codes(amax, amax, dtype)
    return codes.flatten(2, 3)[:, :, : k.shape[2]].contiguous(), scale


def _quantize_values(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [B, H, D, NB * 128] in `key_order` and scales [B, H, NB] of centred and rotated values."""
    blocks = _blocks(v)[..., key_order().to(v.device), :]
    codes, scale = _codes(blocks, blocks.abs().amax((3, 4), keepdim=True), dtype)
    return codes.permute(0, 1, 4, 2, 3).flatten(3).contiguous(), scale[..., 0, 0]


def quantize(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, qk: torch.dtype, pv: torch.dtype,
    rotary: Rotary | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `op.attention_quantize`; computed in `dtype`, all but the rotary embedding."""
    d = q.shape[3]
    if rotary is not None:
        q, k = rotary.embed(q), rotary.embed(k)
    turn = rotation(d).to(q.device, dtype)
    seen = valid(key_range, k.shape[0], k.shape[2], k.device)[:, None, :, None]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k_mean, v_mean = sampled_mean(k, key_range), sampled_mean(v, key_range)
    k = torch.where(seen, k - k_mean[:, :, None], 0.0)
    v = torch.where(seen, v - v_mean[:, :, None], 0.0)
    shift = (q * k_mean.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]).sum(-1)
    q = q @ turn
    q_codes, q_scale = _codes(q, q.abs().amax(-1, keepdim=True), qk)
    k_codes, k_scale = _quantize_keys(k @ turn, qk)
    v_codes, v_scale = _quantize_values(v @ turn, pv)
    return (
        q_codes, q_scale[..., 0], shift.to(torch.float32), k_codes, k_scale, v_codes, v_scale, v_mean.to(torch.float32)
    )  # fmt: skip


def dequantize_queries(q: Tensor, q_scale: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, Hq, Sq, D]: what the codes stand for, not rotated."""
    return (q.to(dtype) * q_scale.to(dtype)[..., None]) @ rotation(q.shape[3]).to(q.device, dtype).T


def dequantize_keys(k: Tensor, k_scale: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, Hkv, Skv, D]: what the codes stand for, not rotated, less the mean of the keys."""
    per_key = k_scale.to(dtype)[..., key_group().to(k.device)].flatten(2)[:, :, : k.shape[2], None]
    return (k.to(dtype) * per_key) @ rotation(k.shape[3]).to(k.device, dtype).T


def dequantize_values(v: Tensor, v_scale: Tensor, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, Hkv, length, D]: what the codes stand for, not rotated, less the mean of the values."""
    place = torch.argsort(key_order()).to(v.device)
    blocks = v.to(dtype).unflatten(3, (-1, BLOCK))[..., place] * v_scale.to(dtype)[:, :, None, :, None]
    return blocks.flatten(3)[..., :length].transpose(2, 3) @ rotation(v.shape[2]).to(v.device, dtype).T
