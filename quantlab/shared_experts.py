"""Shared experts as further routed ones, which every token chooses: five launches of a decoding step less.

A block computes ``experts(x, ...) + shared_experts(x)``, the second by two products of its own that a few tokens wait
for. Where both are of one format, and the shared layer is as wide as one or several experts, the grouped product does
it too: its codes are copied behind the experts' (`Fp8Experts.append`, of INT4 words too where activations are E4M3),
the router (`routing`) adds the choice. The block's forward is held against the module's own on random tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import VerificationError
from quantlab.experts import Fp8Experts
from quantlab.formulas import alike, untouched
from quantlab.fusion import FusedMlp
from quantlab.int4_experts import Int4Fp8Experts
from quantlab.linear import QuantizedLinear
from quantlab.routing import Route

Layers = tuple[QuantizedLinear, QuantizedLinear, QuantizedLinear]

_TOKENS = 32  # that a block is tried on
_WRONG = 0.1  # as far as no rounding goes: two experts have a scale each where their layer has one for both
_ALIKE = 0.02  # how far it may be from its own: sums in another order round activations otherwise now and then


def fuse_shared(model: nn.Module) -> int:
    """Let the shared experts of blocks run among the routed ones, on GPUs; returns how many blocks that were."""
    return sum(map(_fuse, list(model.modules())))


def _fuse(block: Any) -> bool:
    layers = _layers(block)
    if layers is None or not layers[0].key.is_cuda:
        return False
    return append(block, layers)


def append(block: Any, layers: Layers) -> bool:
    """Bind the fused forward to a block, if it computes the same."""
    experts, router = block.experts, block.gate
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, experts.hidden_dim, generator=generator).to(router.weight)
    with torch.no_grad():
        expected = block(x)
        routed = experts(x[0], *reversed(router(x[0])[1:])) + block.shared_experts(x)[0]
        if not isinstance(expected, Tensor) or not alike(routed, expected[0], _ALIKE):
            return False  # the block does more, so copies would be for nothing
        block.forward = FusedBlock(block)
        router.forward.share(experts.append(*layers), block.forward.untouched)
        if not alike(block(x), expected, _WRONG):
            raise VerificationError(
                f"shared experts give other results among the routed ones on {experts.device}; "
                "QUANTLAB_FUSE=0 leaves every layer by itself"
            )
    return True


def _layers(block: Any) -> Layers | None:
    """Gate, up and down of a block's shared experts, where they can be further experts."""
    router: Any = getattr(block, "gate", None)
    experts, shared = (getattr(block, name, None) for name in ("experts", "shared_experts"))
    mlp, route = (None if m is None else vars(m).get("forward") for m in (shared, router))
    if (
        not isinstance(experts, (Fp8Experts, Int4Fp8Experts))
        or not isinstance(mlp, FusedMlp)
        or not isinstance(route, Route)
    ):
        return None
    layers: list[Any] = [*mlp.join.layers, mlp.down]
    if "forward" in vars(block) or experts.shared or not experts.swiglu:
        return None
    if any(type(layer) is not experts.linear or layer.bias is not None for layer in layers):
        return None
    gate, up, down = layers
    inner, hidden = experts.intermediate_dim, experts.hidden_dim
    fits = gate.in_features == hidden == down.out_features and gate.out_features % inner == 0 and inner % 128 == 0
    scale = experts.get_parameter("down_proj" + experts.suffix)
    alike = gate.scale_name.endswith(experts.suffix) and gate.get_parameter(gate.scale_name).dtype == scale.dtype
    whole = experts.num_experts == len(router.weight) and gate.key.device == experts.device
    return (gate, up, down) if fits and alike and whole else None


class FusedBlock:
    """The `forward` of a block whose experts include the shared ones, as long as these are as they were copied: with
    adapters or hooks they are called again, and the router chooses the routed ones alone."""

    def __init__(self, block: Any) -> None:
        self.block, self.shared, self.mlp = block, block.shared_experts, block.shared_experts.forward

    def untouched(self) -> bool:
        same = self.block.shared_experts is self.shared and untouched(self.shared, self.mlp)
        return same and bool(self.mlp.untouched())

    def __call__(self, hidden_states: Tensor) -> Any:
        if not self.block.gate.forward.chooses(hidden_states):
            return type(self.block).forward(self.block, hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.block.gate(flat)
        out: Tensor = self.block.experts(flat, index, weights)
        return out.view(hidden_states.shape)
