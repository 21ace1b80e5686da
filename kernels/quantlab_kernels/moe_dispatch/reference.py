"""The definition, and the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.quantize_fp8 import reference as quantizer


def route(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """positions [T, k] int32, -1 for an index that is no expert here, and counts [E] int64.

    Rows are sorted by expert; those of one expert keep the order of the tokens and of their choices.
    """
    flat = top_k_index.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.argsort(flat, stable=True)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    positions = positions.masked_fill(flat == experts, -1)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    return positions.to(torch.int32).view(top_k_index.shape), counts[:-1]


def scatter(codes: Tensor, scale: Tensor, positions: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """Copy row t of codes and scale to the rows positions[t] of `out`."""
    token, choice = (positions >= 0).nonzero(as_tuple=True)
    rows = positions[token, choice].long()
    out[0].view(torch.uint8)[rows] = codes.view(torch.uint8)[token]
    out[1][rows] = scale[token]


def quantize(x: Tensor, group: bool) -> tuple[Tensor, Tensor]:
    """As `quantize_fp8_group` or `quantize_fp8_token`."""
    return quantizer.group(x, None, False) if group else quantizer.token(x)
