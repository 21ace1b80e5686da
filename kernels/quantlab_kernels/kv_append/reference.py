"""The definition, and the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.kv import code_of, quantize_rows


def smooth(k: Tensor, mean: Tensor | None, channel: Tensor | None) -> Tensor:
    """Keys [B, Hkv, S, D] in float32, less their mean and divided by their channels' scale."""
    k = k.to(torch.float32)
    if mean is not None:
        k = k - mean[:, :, None]
    return k / channel[:, :, None] if channel is not None else k


def rows_of(
    tokens: int, length: Tensor, slots: Tensor | None, capacity: int, ring: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(position, row, slot), each [B, S] int64: where token i of a chunk goes; slot -1 where it goes nowhere.

    Token i stands at position ``length - S + i``. row is the sequence, or the page that ``slots`` names. A ring that
    the chunk would go round keeps its newest tokens.
    """
    position = length.long()[:, None] - tokens + torch.arange(tokens, device=length.device)
    if slots is not None:
        slot = slots.long()
        return position, torch.where(slot < 0, 0, slot // capacity), torch.where(slot < 0, -1, slot % capacity)
    row = torch.arange(len(length), device=length.device)[:, None].expand_as(position)
    if ring:
        kept = (position >= 0) & (position >= length.long()[:, None] - capacity)
        return position, row, torch.where(kept, position % capacity, -1)
    return position, row, torch.where((position >= 0) & (position < capacity), position, -1)


def write(codes: Tensor, scale: Tensor | None, x: Tensor, row: Tensor, slot: Tensor) -> None:
    """Rows x [B, Hkv, S, D] quantized into codes and scale at [row, :, slot]."""
    keep = slot >= 0
    new, new_scale = quantize_rows(x.transpose(1, 2)[keep], code_of(codes), codes.dtype)
    codes.view(torch.uint8)[row[keep], :, slot[keep]] = new.view(torch.uint8)
    if scale is not None and new_scale is not None:
        scale[row[keep], :, slot[keep]] = new_scale


def write_near(near: Tensor, x: Tensor, position: Tensor, start: Tensor, length: Tensor, first: int) -> None:
    """Rows x [B, Hkv, S, D] as they are into the slots of the first tokens and of the newest."""
    newest = near.shape[2] - first
    row = torch.arange(len(length), device=x.device)[:, None].expand_as(position)
    rank = position - start.long()[:, None]
    early = (rank >= 0) & (rank < first)
    late = (rank >= first) & (position >= length.long()[:, None] - newest)
    rows = x.transpose(1, 2).to(near.dtype)
    near[row[early], :, rank[early]] = rows[early]
    if newest:
        near[row[late], :, first + position[late] % newest] = rows[late]
