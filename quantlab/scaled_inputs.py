"""Llama 4's routed experts: a token's score scales what its experts read, and transformers computes all of them for all
tokens, the inputs of those that were not chosen scaled by 0.

Here only the chosen ones run, on the same layers as other architectures' experts (`experts`): scores go into the rows,
and the results are added up without weights. One scale for each token makes that as exact as scaling the results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK, EXPERTS = "Llama4TextMoe", "Llama4TextExperts"


class _Straight(nn.Module):
    """What `experts.Experts` is built from: parameters without data, [E, 2I, H] and [E, H, I]."""

    def __init__(self, turned: Any) -> None:
        super().__init__()
        with torch.device("meta"):
            for name in ("gate_up_proj", "down_proj"):
                shape = getattr(turned, name).transpose(1, 2).shape
                self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.act_fn = turned.act_fn

    def _default_apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        product: Tensor = self.act_fn(gate) * up
        return product

    _apply_gate = _default_apply_gate


def stand_in(module: nn.Module) -> nn.Module:
    """The module itself, or for experts of such a block one that holds their weights as others do."""
    return _Straight(module) if type(module).__name__ == EXPERTS else module


def bind(block: Any) -> None:
    """Give a block whose experts were replaced a forward that runs the chosen ones; others stay as they are."""
    if type(block).__name__ == BLOCK:
        block.forward = ScaledInputs(block)


class ScaledInputs:
    """The `forward` of such a block: [..., H] to the shared expert's and the chosen ones' sum [T, H], and logits."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        block = self.block
        flat = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(flat)
        weights, index = scores.topk(block.top_k, dim=1)  # of the others they are 0
        rows = (flat[:, None] * weights[..., None]).flatten(0, 1)
        routed: Tensor = block.experts(rows, index.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
        out: Tensor = block.shared_expert(flat) + routed.unflatten(0, index.shape).sum(1)
        return out, logits
