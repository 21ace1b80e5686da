"""The definition, and the CPU implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantlab_kernels.moe_route.op import Rule


def logits_of(x: Tensor, weight: Tensor, rounded: bool) -> Tensor:
    """[T, E]: x weight^T with products and sums in float32, in x's dtype where `rounded`."""
    logits = x.to(torch.float32) @ weight.to(torch.float32).T
    return logits.to(x.dtype) if rounded else logits


def choose(logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Weights [T, k + shared] float32 and experts [T, k + shared] int64, best first, of logits [T, E]."""
    logits = logits.to(torch.float32)
    scores = logits.sigmoid() if rule.sigmoid else logits.softmax(-1)
    choice = scores if bias is None else scores + bias.to(torch.float32)
    if rule.groups > 1:
        groups = choice.unflatten(-1, (rule.groups, -1))
        kept = groups.topk(rule.best, -1).values.sum(-1).topk(rule.kept, -1).indices
        left_out = torch.ones(groups.shape[:-1], dtype=torch.bool, device=logits.device).scatter_(-1, kept, False)
        choice = groups.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
    index = choice.topk(rule.choices, -1).indices
    weights = scores.gather(-1, index)
    if rule.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = torch.cat((weights * rule.factor, weights.new_ones(len(weights), rule.shared)), -1)
    shared = torch.arange(rule.shared, device=index.device) + logits.shape[1]
    return weights, torch.cat((index, shared.expand(len(index), -1)), -1)
