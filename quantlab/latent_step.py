"""Latent attention in few launches, for decoding steps above all.

Between the projections and attention over the packed latents, transformers' modules split, normalize, turn and join
tensors of a few kilobytes: a dozen launches that take longer than what they compute. For one new token of each sequence
a module gets a `forward` that does all of it in one (`mla_step`), and reads both projections of its input in one GEMM
where they are plain; quantized ones are joined already (`fusion`). Prompts turn queries where they are. Where gradients
or a compiler are at work they keep the module's own forward, as does everything else.

No model is known by name. What a module does around attention is observed: its own forward runs once on random input,
and our steps must give what it handed to the cache and to attention, and returned. Where they do not, it stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.formulas import alike, epsilon, norm_offset, untouched
from quantlab.latent import Absorbed, LatentHandle, LatentLayer, absorbed_of, modules
from quantlab_kernels import mla_decode, mla_turn
from quantlab_kernels.mla_append.reference import normalized, turned_pairs

_ALIKE = 0.02  # how far steps may be from the module's own: 16 bits round each product of a rotation
_TOKENS = 3  # that the module's own forward is observed on
_LAYOUTS = ((False, False), (True, False), (True, True))  # channels of a pair side by side: projected, cached
_BEYOND = ("position_bias", "softcap", "s_aux", "indices", "sliding_window")  # of attention, which steps do not know


def shorten(model: nn.Module) -> int:
    """Give the latent attention modules of a model, prepared by `latent.use`, short steps; returns how many fit."""
    return sum(map(_shorten, modules(model)))


def restore(model: nn.Module) -> None:
    """Take back what `shorten` did."""
    for module in modules(model):
        step = vars(module).get("forward")
        if isinstance(step, Step):
            del module.forward
            if getattr(step.own, "__func__", None) is not type(module).forward:
                module.forward = step.own


def _shorten(module: Any) -> bool:
    if hasattr(module, "_hf_hook") or not _has_parts(module):
        return False
    step = Step(module)
    with torch.no_grad():
        layout = _layout(step, complex_positions=False) or _layout(step, complex_positions=True)
    if layout is None:
        return False
    step.layout = layout
    step.join = PlainJoin.of(step.query_projection(), module.kv_a_proj_with_mqa)
    module.forward = step
    return True


def _has_parts(module: Any) -> bool:
    names = "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj", "layer_idx", "scaling"
    if any(getattr(module, name, None) is None for name in names):
        return False
    query = getattr(module, "q_proj", None) is not None or all(
        getattr(module, name, None) is not None for name in ("q_a_proj", "q_a_layernorm", "q_b_proj")
    )
    return query and norm_offset(module.kv_a_layernorm) == 0


class Step:
    """The `forward` of a latent attention module: short for one new token over a packed cache, else its own."""

    def __init__(self, module: Any) -> None:
        self.module, self.own = module, module.forward
        self.scale = float(module.scaling)
        self.layout = _LAYOUTS[0]
        self.join: PlainJoin | None = None

    @property
    def absorbed(self) -> Absorbed:
        return absorbed_of(self.module)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer(hidden_states, kwargs)
        if layer is not None:
            return self.step(hidden_states, kwargs["position_embeddings"], layer), None
        attend = self._attention()
        if args or attend is None or kwargs.get("position_embeddings") is None or self._is_traced():
            return self.own(hidden_states, *args, **kwargs)
        return self.prompt(attend, hidden_states, **kwargs), None

    def _is_traced(self) -> bool:
        """Whether gradients, dropout or a graph ask for the module's own forward."""
        return torch.is_grad_enabled() or self.module.training or torch.compiler.is_compiling()

    def _attention(self) -> Any:
        """The attention function that the model is set to; None for one that its file defines."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # which may be importing us

        return ALL_ATTENTION_FUNCTIONS.get(self.module.config._attn_implementation)

    def _layer(self, hidden: Tensor, kwargs: dict[str, Any]) -> LatentLayer | None:
        """The layer of the cache to step on; None where the module's own forward is to be called."""
        past = kwargs.get("past_key_values")
        if past is None or hidden.shape[1] != 1 or kwargs.get("position_embeddings") is None or torch.is_grad_enabled():
            return None
        layers = past.layers if self.module.layer_idx < len(past.layers) else ()
        layer = layers[self.module.layer_idx] if layers else None
        if not isinstance(layer, LatentLayer) or not layer.filled:
            return None
        layer.notice(kwargs.get("attention_mask"))
        if layer.irregular:
            return None
        return layer if layer.batch_size == hidden.shape[0] else None

    def step(self, hidden: Tensor, positions: Any, layer: LatentLayer) -> Tensor:
        """[B, 1, hidden] of one new token of each sequence."""
        module, absorbed = self.module, self.absorbed
        query, row = self.projected(hidden)
        plain, turning = query.split([absorbed.nope, absorbed.rope], -1)
        latent, rope = row.split([absorbed.latent, absorbed.rope], -1)
        cos, sin = _angles(positions, absorbed.rope)
        norm: Any = module.kv_a_layernorm
        weight, eps = norm.weight, epsilon(norm)
        if absorbed.turn is not None:
            latent, weight = absorbed.turned(norm(latent)), None
        turned = layer.step(turning, latent, rope, cos=cos, sin=sin, norm=weight, eps=eps, layout=self.layout)
        out, _ = mla_decode(
            absorbed.absorb(plain), turned, layer.cache, layer.length, scale=self.scale, start=layer.start,
            longest=layer.longest,
        )  # fmt: skip
        return module.o_proj(absorbed.results(out).flatten(2))

    def prompt(
        self, attend: Any, hidden: Tensor, position_embeddings: Any, attention_mask: Tensor | None = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """[B, S, hidden] as the module's own forward, which copies queries to turn a part of them."""
        module, absorbed = self.module, self.absorbed
        query, row = self.projected(hidden)
        latent, rope = row.split([absorbed.latent, absorbed.rope], -1)
        interleaved, kept = self.layout
        angles = _angles(position_embeddings, absorbed.rope)
        mla_turn(query[..., absorbed.nope :], rope, *angles, interleaved=interleaved, kept_interleaved=kept)
        latent, rope = module.kv_a_layernorm(latent)[:, None], rope[:, None]
        if past_key_values is not None:
            latent, rope = past_key_values.update(latent, rope, module.layer_idx)
        key, value = module.expand_kv(latent, rope)
        out, _ = attend(
            module, query.transpose(1, 2), key, value, attention_mask, dropout=0.0, scaling=self.scale, **kwargs
        )
        return module.o_proj(out.flatten(2))

    def query_projection(self) -> Any:
        """The projection of hidden states that queries come from."""
        module = self.module
        return module.q_a_proj if getattr(module, "q_proj", None) is None else module.q_proj

    def projected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, S, H, nope + R], and rows [B, S, L + R] of latents and position parts."""
        module, first = self.module, self.query_projection()
        if self.join is not None and self.join.is_of(first, module.kv_a_proj_with_mqa):
            query, row = self.join(hidden)
        else:
            query, row = first(hidden), module.kv_a_proj_with_mqa(hidden)
        if getattr(module, "q_proj", None) is None:
            query = module.q_b_proj(module.q_a_layernorm(query))
        return query.unflatten(-1, (-1, self.absorbed.nope + self.absorbed.rope)), row


class PlainJoin:
    """Two linear layers in 16 bits over one input as one GEMM; their weights become views of one buffer.

    For a moment it takes the memory of both once more. Layers with adapters, hooks or biases are left alone, at any
    time, as are those that were moved to another device.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        self.layers = first, second
        self.sizes = [len(layer.weight) for layer in self.layers]
        self.weight = torch.cat([layer.weight.data for layer in self.layers])
        for layer, view in zip(self.layers, self.weight.split(self.sizes), strict=True):
            layer.weight.data = view

    @classmethod
    def of(cls, first: Any, second: Any) -> PlainJoin | None:
        layers = first, second
        if not all(type(layer) is nn.Linear and layer.bias is None and untouched(layer) for layer in layers):
            return None
        alike = first.weight.dtype == second.weight.dtype and first.weight.device == second.weight.device
        return cls(first, second) if alike and first.weight.is_floating_point() else None

    def is_of(self, first: Any, second: Any) -> bool:
        """Whether these are the layers that were joined, where they were."""
        if first is not self.layers[0] or second is not self.layers[1]:
            return False
        if torch.compiler.is_compiling():
            return self.weight.device == first.weight.device
        parts = self.weight.split(self.sizes)
        here = all(layer.weight.data_ptr() == x.data_ptr() for layer, x in zip(self.layers, parts, strict=True))
        return here and all(map(untouched, self.layers))

    def __call__(self, x: Tensor) -> Any:
        return nn.functional.linear(x, self.weight).split(self.sizes, -1)


def _angles(positions: Any, rope: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, S, R / 2], of complex numbers or of a pair whose halves are alike."""
    if isinstance(positions, Tensor):
        cos, sin = torch.view_as_real(positions).unbind(-1)
    else:
        cos, sin = (x[..., : rope // 2] for x in positions)
    return cos, sin


@dataclass
class _Seen:
    """In place of a cache: what a forward hands to it and to attention."""

    heads: int
    values: int
    latent: Any = None
    rope: Any = None
    query: Any = None
    out: Any = None
    asked: dict[str, Any] = field(default_factory=dict)

    def update(self, latent: Tensor, rope: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.latent, self.rope = latent, rope
        handle = _Watching(self)
        return handle, handle


class _Watching(LatentHandle):
    def __init__(self, seen: _Seen) -> None:
        self.seen = seen

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float | None, kwargs: dict[str, Any], training: bool = False
    ) -> Tensor:
        seen = self.seen
        seen.query, seen.asked = query, {**kwargs, "scaling": scaling}
        shape = query.shape[0], query.shape[2], seen.heads, seen.values
        seen.out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(query)
        return seen.out


def _layout(step: Step, complex_positions: bool) -> tuple[bool, bool] | None:
    """How the module's own forward lays out what it turns, if all that it does is what a step does."""
    module, absorbed = step.module, step.absorbed
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TOKENS, module.kv_a_proj_with_mqa.in_features, generator=generator)
    hidden = hidden.to(absorbed.device, absorbed.dtype)
    angle = (torch.rand(1, _TOKENS, absorbed.rope // 2, generator=generator) * 6).to(absorbed.device)
    both = torch.cat((angle, angle), -1)
    positions: Any = (both.cos().to(absorbed.dtype), both.sin().to(absorbed.dtype))
    if complex_positions:
        positions = torch.polar(torch.ones_like(angle), angle)
    seen = _Seen(absorbed.heads, absorbed.v)
    try:
        found = step.own(hidden_states=hidden, position_embeddings=positions, attention_mask=None, past_key_values=seen)
    except Exception:  # it wants positions in another form, or more: any error says that it is not this forward
        return None
    if seen.asked.get("scaling") != step.scale or any(seen.asked.get(name) is not None for name in _BEYOND):
        return None
    if not isinstance(found, tuple) or len(found) != 2 or found[1] is not None:
        return None
    return _compared(step, seen, hidden, _angles(positions, absorbed.rope), found[0])


def _compared(
    step: Step, seen: _Seen, hidden: Tensor, angles: tuple[Tensor, Tensor], result: Tensor
) -> tuple[bool, bool] | None:
    module, absorbed = step.module, step.absorbed
    query, row = step.projected(hidden)
    plain, turning = query.split([absorbed.nope, absorbed.rope], -1)
    latent, rope = row.split([absorbed.latent, absorbed.rope], -1)
    norm: Any = module.kv_a_layernorm
    pairs = [
        (normalized(latent, norm.weight, epsilon(norm) or 0.0), seen.latent[:, 0]),
        (plain, seen.query.transpose(1, 2)[..., : absorbed.nope]),
        (module.o_proj(seen.out.flatten(2)), result),
    ]
    if not all(alike(ours, theirs, _ALIKE) for ours, theirs in pairs):
        return None
    for layout in _LAYOUTS:
        key = turned_pairs(rope, *angles, *layout)
        queries = turned_pairs(turning, angles[0][:, :, None], angles[1][:, :, None], *layout)
        turned = (key, seen.rope[:, 0]), (queries, seen.query.transpose(1, 2)[..., absorbed.nope :])
        if all(alike(ours, theirs, _ALIKE) for ours, theirs in turned):
            return layout
    return None
