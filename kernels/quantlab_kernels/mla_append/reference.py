"""The definition, and the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.kv import code_of
from quantlab_kernels.common.latent import quantize_latent


def normalized(latent: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of rows [..., L] in float32, without a rounding in between; the rows as they are without weights."""
    latent = latent.to(torch.float32)
    if norm is None:
        return latent
    return latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps) * norm.to(torch.float32)


def turned(rope: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """Rows [B, S, R] turned by the position, in float32: channels j and j + R/2 are a pair of the result."""
    rope = rope.to(torch.float32)
    if cos is None or sin is None:
        return rope
    one, two = (rope[..., 0::2], rope[..., 1::2]) if interleaved else rope.chunk(2, -1)
    straight, across = torch.cat((one, two), -1), torch.cat((-two, one), -1)
    return straight * cos.to(torch.float32) + across * sin.to(torch.float32)


def turned_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, kept_interleaved: bool) -> Tensor:
    """Rows [..., R] turned by angles of R / 2 channels, in float32, with pairs side by side or R / 2 apart."""
    x = x.to(torch.float32)
    one, two = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = cos.to(torch.float32), sin.to(torch.float32)
    pair = one * cos - two * sin, two * cos + one * sin
    return torch.stack(pair, -1).flatten(-2) if kept_interleaved else torch.cat(pair, -1)


def write(
    codes: Tensor, kept: Tensor, scale: Tensor | None, latent: Tensor, rope: Tensor, row: Tensor, slot: Tensor
) -> None:
    """Rows [B, S, L] and [B, S, R] into codes, scale and kept at [row, slot]; slot -1 is nowhere."""
    keep = slot >= 0
    new, new_scale = quantize_latent(latent[keep], code_of(codes), codes.dtype)
    place = row[keep], slot[keep]
    codes.view(torch.uint8)[place] = new.contiguous().view(torch.uint8)
    kept[place] = rope[keep].to(kept.dtype)
    if scale is not None and new_scale is not None:
        scale[place] = new_scale
