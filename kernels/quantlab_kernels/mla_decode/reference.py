"""The definition, and the CPU implementation: attention over the dequantized latents, which are keys and values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantlab_kernels.common.latent import PackedLatent, dequantize_latent


def gathered(cache: PackedLatent, table: Tensor) -> PackedLatent:
    """A dense cache of what a block table [B, pages] deals out."""
    page = table.long().clamp(0, cache.latent.shape[0] - 1)  # pages beyond a sequence's length may be anything

    def gather(x: Tensor) -> Tensor:
        plain = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
        return plain[page].flatten(1, 2).view(x.dtype)

    scale = None if cache.scale is None else gather(cache.scale)
    return replace(cache, latent=gather(cache.latent), rope=gather(cache.rope), scale=scale)


def operands(cache: PackedLatent, length: Tensor, start: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents [B, S, L] and position parts [B, S, R]; 0 where a slot holds nothing that is read."""
    slot = torch.arange(cache.capacity, device=length.device)
    known = ((slot < length.long()[:, None]) & (slot >= start.long()[:, None]))[..., None]
    latent = dequantize_latent(cache.latent, cache.scale, dtype)
    return torch.where(known, latent, 0.0), torch.where(known, cache.rope.to(dtype), 0.0)


def attend(
    q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor, start: Tensor | None, scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, Sq, H, L], lse [B, H, Sq] and the weights [B, H, Sq, slots], in `dtype`; see `op.mla_decode`."""
    sq = q_latent.shape[1]
    start = torch.zeros_like(length) if start is None else start
    latent, rope = operands(cache, length, start, dtype)
    scores = torch.einsum("bqhl,bsl->bhqs", q_latent.to(dtype), latent)
    scores = (scores + torch.einsum("bqhr,bsr->bhqs", q_rope.to(dtype), rope)) * scale
    slot = torch.arange(cache.capacity, device=length.device)
    place = (length.long()[:, None] - sq + torch.arange(sq, device=length.device))[..., None]
    seen = ((slot <= place) & (slot >= start.long()[:, None, None]))[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(seen & (lse > -torch.inf)[..., None], torch.exp(scores - lse[..., None]), 0.0)
    return torch.einsum("bhqs,bsl->bqhl", weights, latent), lse, weights
