"""The definition, and the CPU implementation: attention over the dequantized cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab_kernels.common.kv import PackedKV, dequantize_rows


@dataclass(frozen=True)
class Attributes:
    """What attention does besides its operands; see `op.attention_decode`. window: -1 is none."""

    scale: float
    window: int = -1
    softcap: float = 0.0


def gathered(cache: PackedKV, table: Tensor) -> PackedKV:
    """A dense cache of what a block table [B, pages] deals out."""

    page = table.long().clamp(0, cache.k.shape[0] - 1)  # pages beyond a sequence's length may be anything

    def gather(x: Tensor) -> Tensor:
        plain = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
        return plain[page].transpose(1, 2).flatten(2, 3).view(x.dtype)

    k_scale = None if cache.k_scale is None else gather(cache.k_scale)
    v_scale = None if cache.v_scale is None else gather(cache.v_scale)
    return replace(cache, k=gather(cache.k), v=gather(cache.v), k_scale=k_scale, v_scale=v_scale)


def positions(cache: PackedKV, length: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """([B, S], [B, first + newest]) int64: the position that each slot, and each near slot, holds; -1 for none.

    A token that is in a near slot is not read from its other one.
    """
    slot = torch.arange(cache.capacity, device=length.device)
    length, start = length.long()[:, None], start.long()[:, None]
    held = slot + cache.capacity * torch.div(length - 1 - slot, cache.capacity, rounding_mode="floor")
    packed = held if cache.ring else slot.expand(len(length), -1)
    exact_to, exact_from = start + cache.first, length - cache.newest
    packed = torch.where((packed >= exact_to) & (packed < exact_from) & (packed < length), packed, -1)
    return packed, near_positions(cache, length[:, 0], start[:, 0])


def near_positions(cache: PackedKV, length: Tensor, start: Tensor) -> Tensor:
    """[B, first + newest] int64: the position that each near slot holds; -1 for none."""
    length, start = length.long()[:, None], start.long()[:, None]
    early = start + torch.arange(cache.first, device=length.device)
    late = torch.arange(cache.newest, device=length.device)
    if cache.newest:
        late = late + cache.newest * torch.div(length - 1 - late, cache.newest, rounding_mode="floor")
    near = torch.cat((early, torch.where(late >= start + cache.first, late, -1).expand(len(length), -1)), 1)
    return torch.where(near < length, near, -1)


def attend(
    q: Tensor, cache: PackedKV, length: Tensor, start: Tensor | None, attributes: Attributes, sinks: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, Sq, Hq, D], lse [B, Hq, Sq] and the weights [B, Hq, Sq, slots + near slots], in `dtype`."""
    heads, sq = q.shape[1:3]
    groups = heads // cache.k.shape[1]
    start = torch.zeros_like(length) if start is None else start
    position, near = positions(cache, length, start)
    keys, values = operands(cache, position, near, dtype)
    queries = q.to(dtype).unflatten(1, (-1, groups))
    scores = torch.einsum("bhgqd,bhsd->bhgqs", queries, keys).flatten(1, 2) * attributes.scale
    if attributes.softcap > 0:
        scores = attributes.softcap * torch.tanh(scores / attributes.softcap)
    at = torch.cat((position, near), 1)[:, None]
    place = (length.long()[:, None] - sq + torch.arange(sq, device=q.device))[..., None]
    seen = (at >= start.long()[:, None, None]) & (at <= place) & (at >= 0)
    if attributes.window >= 0:
        seen &= at > place - attributes.window
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(dtype)[:, None])
    weights = torch.where(seen[:, None] & (lse > -torch.inf)[..., None], torch.exp(scores - total[..., None]), 0.0)
    out = torch.einsum("bhgqs,bhsd->bqhgd", weights.unflatten(1, (-1, groups)), values).flatten(2, 3)
    return out, lse, weights


def operands(cache: PackedKV, position: Tensor, near: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, slots + near slots, D]; 0 where a slot holds nothing that is read."""
    k, v = dequantize_rows(cache.k, cache.k_scale, dtype), dequantize_rows(cache.v, cache.v_scale, dtype)
    if cache.k_channel is not None:
        k = k * cache.k_channel.to(dtype)[:, :, None]
    if cache.k_mean is not None:
        k = k + cache.k_mean.to(dtype)[:, :, None]
    k, v = (torch.where((position >= 0)[:, None, :, None], x, 0.0) for x in (k, v))
    if cache.k_near is None or cache.v_near is None:
        return k, v
    exact = (torch.where((near >= 0)[:, None, :, None], x.to(dtype), 0.0) for x in (cache.k_near, cache.v_near))
    k_near, v_near = exact
    return torch.cat((k, k_near), 2), torch.cat((v, v_near), 2)
