"""Layers that read the same tensor become one GEMM; gated MLPs and norms quantize what they produce as they go, and
attention modules turn queries and keys in one launch (`rotary`).

Nothing about a model's class is replaced: a module that takes part gets another `forward` of its own, weights of joined
layers become views of one buffer under their old names, so that state dicts and checkpoints stay as they are. What may
be joined is read from the source of each `forward` (`source_patterns`), not from a list of models.

Which norm feeds quantized layers is learnt in the first forward outside `torch.compile`: a joined layer that is handed
the very tensor a norm returned says so, and from then on that norm quantizes its output in the same kernel.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.attention import share_keys
from quantlab.formulas import epsilon, is_silu, norm_offset, untouched
from quantlab.int4_linear import Int4Linear
from quantlab.linear import Fp8BlockLinear, QuantizedLinear
from quantlab.placement import unhook_blocks
from quantlab.rotary import fuse_rotary
from quantlab.source_patterns import GatedMlp, gated_mlp, shared_inputs
from quantlab_kernels import rmsnorm, rmsnorm_quantize, swiglu_quantize
from quantlab_kernels.common.int4 import ROWS


@dataclass(frozen=True)
class Fusion:
    """How many groups of layers were joined, gated MLPs, norms and attention modules prepared; `shared_keys`: whether
    attention reads the keys of grouped queries without copying them."""

    joined: int = 0
    mlps: int = 0
    norms: int = 0
    rotary: int = 0
    shared_keys: bool = False


def fuse(model: nn.Module) -> Fusion:
    """Join what can be joined, in place. ``QUANTLAB_FUSE=0`` in the environment leaves every layer by itself.

    Outputs change within the rounding of one FP8 quantization: a fused producer does not round to 16 bits in between.
    Layers on different devices, without data, with static activation scales, or of different layouts are left alone.
    """
    if not wanted():
        return Fusion()
    unhook_blocks(model)
    mailbox = Mailbox()
    joined = mlps = norms = rotary = 0
    for module in list(model.modules()):
        groups = _groups(module)
        joined += len(groups)
        joins = [Join([getattr(module, name) for name in names], mailbox) for names in groups]
        mlps += _fuse_mlp(module, dict(zip(groups, joins, strict=True)))
    if joined:
        norms = sum(_fuse_norm(module, mailbox) for module in model.modules())
        rotary = sum(map(fuse_rotary, model.modules()))
    return Fusion(joined, mlps, norms, rotary, share_keys(model))


def wanted() -> bool:
    """Whether the environment leaves it to us."""
    return os.environ.get("QUANTLAB_FUSE") != "0"


def _groups(module: nn.Module) -> list[tuple[str, ...]]:
    """Names of children that can be joined, one tuple per group."""
    layers = {name: child for name, child in module.named_children() if isinstance(child, QuantizedLinear)}
    if len(layers) < 2:
        return []
    groups = shared_inputs(type(module).forward, frozenset(layers))
    return [names for names in groups if _joinable([layers[name] for name in names])]


def _joinable(layers: list[QuantizedLinear]) -> bool:
    first = layers[0]
    alike = len({_signature(layer) for layer in layers}) == 1
    rows = 128 if isinstance(first, Fp8BlockLinear) else ROWS if isinstance(first, Int4Linear) else 1
    whole_blocks = all(layer.out_features % rows == 0 for layer in layers[:-1])
    return alike and whole_blocks and all(map(_plain, layers)) and getattr(first, "activation_scale", None) is None


def _plain(layer: QuantizedLinear) -> bool:
    """Has data of its own and nobody's hooks: not offloaded, not sharded, not joined already."""
    return type(layer.key) is nn.Parameter and not layer.key.is_meta and "forward" not in vars(layer)


def _signature(layer: QuantizedLinear) -> tuple[Any, ...]:
    bias = None if layer.bias is None else layer.bias.dtype
    static = getattr(layer, "activation_scale", None) is not None
    codes = layer.key.device, layer.key.dim()  # INT4 weights of others may have to stay in words
    return type(layer), layer.in_features, codes, _scale_dtype(layer), bias, static


def _scale_dtype(layer: QuantizedLinear) -> torch.dtype:
    return layer.get_parameter(layer.scale_name).dtype


@dataclass(frozen=True)
class Note:
    """The last output of a norm: a weak reference to it and its version, and its codes and scale where the norm made
    them for layers of some kind."""

    output: weakref.ref[Tensor]
    version: int | None
    norm: FusedNorm
    kind: type[QuantizedLinear] | None
    quantized: tuple[Tensor, Tensor] | None


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None where nothing counts that: for tensors of inference mode, and while
    a graph is traced."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class Mailbox:
    """Hands codes from a norm to the layer that reads its output. One note at a time, taken at most once."""

    def __init__(self) -> None:
        self.note: Note | None = None

    def __getstate__(self) -> dict[str, None]:
        """A copy of the model starts without one: it is of the last forward, and weak references cannot be pickled."""
        return {"note": None}

    def take(self, x: Tensor, kind: type[QuantizedLinear]) -> tuple[Tensor, Tensor] | None:
        """Codes and scale of x if a norm left them for layers of this kind; tells a norm that made x without them to
        make them next time."""
        note = self.note
        if note is None or note.output() is not x or note.version != _version(x):
            return None
        self.note = None
        note.norm.feeds = kind
        return note.quantized if note.kind is kind else None


@dataclass(frozen=True)
class Pending:
    """Results of a join that not every layer has fetched yet. Immutable: threads may share a model."""

    source: Tensor
    version: int | None
    parts: tuple[Tensor, ...]
    taken: frozenset[int]


class Join:
    """Linear layers over one input as one GEMM. Each layer's own `forward` fetches its share of the result.

    The first layer that is called computes all; a call with another tensor, with one that was changed in place, or a
    second one by the same layer, computes anew. Where the layers were moved to another device the buffer is made again.
    """

    def __init__(self, layers: list[QuantizedLinear], mailbox: Mailbox) -> None:
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self.mailbox = mailbox
        self._pending: Pending | None = None
        self._connect()
        for index, layer in enumerate(layers):
            layer.forward = Share(self, index)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """As `Mailbox`."""
        return {**vars(self), "_pending": None}

    def _connect(self) -> None:
        """Make the buffer that all weights are views of. For a moment it takes the memory of these layers once more."""
        first = self.layers[0]
        with torch.device("meta"):
            build: Any = type(first)
            whole = build(
                first.in_features,
                sum(self.sizes),
                first.bias is not None,
                scale_name=first.scale_name,
                scale_dtype=_scale_dtype(first),
            )
        for name in [name for name, _ in whole.named_parameters()]:
            parts = [layer.get_parameter(name) for layer in self.layers]
            data = _concatenate([part.data for part in parts])
            setattr(whole, name, nn.Parameter(data, requires_grad=False))
            for part, view in zip(parts, data.split([len(p) for p in parts]), strict=True):
                part.data = view
        whole.finish_loading()
        if whole._scale is not None:
            for layer, view in zip(
                self.layers, whole._scale.split([len(layer.scale) for layer in self.layers]), strict=True
            ):
                layer._scale = view
        self.whole = whole

    def fetch(self, index: int, x: Tensor) -> Tensor:
        """The share of layer `index` in the result for x."""
        pending, version = self._pending, _version(x)
        if pending is None or pending.source is not x or pending.version != version or index in pending.taken:
            pending = Pending(x, version, self.compute(x).split(self.sizes, dim=-1), frozenset())
        taken = pending.taken | {index}
        done = len(taken) == len(self.layers)
        self._pending = None if done else Pending(x, version, pending.parts, taken)
        return pending.parts[index]

    def connected(self) -> bool:
        """Whether the buffer still is where the layers are; it is made again, except while tracing."""
        devices = {layer.key.device for layer in self.layers}
        if devices == {self.whole.key.device}:
            return True
        if torch.compiler.is_compiling() or len(devices) > 1 or self.layers[0].key.is_meta:
            return False
        self._connect()
        return True

    def compute(self, x: Tensor) -> Tensor:
        """[..., sum of N] for x [..., K]."""
        whole, flat = self.whole, x.reshape(-1, self.whole.in_features)
        fed = whole.grouped(flat.shape[0]) is not None and not torch.compiler.is_compiling()
        codes: Any = self.mailbox.take(x, type(whole)) if fed else None
        if codes is None:
            codes = whole.quantize_input(flat)
        return whole.matmul(*codes, x.dtype).reshape(*x.shape[:-1], whole.out_features)


class Share:
    """The `forward` of one joined layer. An object and not a closure, so that a copy of the model is a whole copy."""

    def __init__(self, join: Join, index: int) -> None:
        self.join, self.index = join, index

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self.join.connected():
            layer = self.join.layers[self.index]
            return type(layer).forward(layer, x)
        return self.join.fetch(self.index, x)


def _concatenate(parts: list[Tensor]) -> Tensor:
    """torch.cat over rows, of FP8 tensors too, which it refuses on some devices."""
    dtype = parts[0].dtype
    return (
        torch.cat([p.contiguous().view(torch.uint8).reshape(len(p), -1) for p in parts])
        .view(dtype)
        .reshape(-1, *parts[0].shape[1:])
    )


def _fuse_mlp(module: nn.Module, joins: dict[tuple[str, ...], Join]) -> bool:
    """Give ``down(silu(gate(x)) * up(x))`` a forward that quantizes the product without writing it in 16 bits."""
    mlp = gated_mlp(type(module).forward)
    join = joins.get((mlp.gate, mlp.up)) if mlp else None
    if mlp is None or join is None or "forward" in vars(module):
        return False
    down, act = getattr(module, mlp.down), getattr(module, mlp.act)
    takes_codes = isinstance(down, QuantizedLinear) and down.grouped(1) is not None
    if not takes_codes or getattr(down, "activation_scale", None) is not None or not is_silu(act):
        return False
    module.forward = FusedMlp(module, join, mlp)
    return True


class FusedMlp:
    """The `forward` of a gated MLP: the product of its halves goes from registers into codes.

    It calls none of the module's children, so the module's own takes over where one of them was replaced, by an adapter
    around it for example, or has hooks.
    """

    def __init__(self, module: nn.Module, join: Join, names: GatedMlp) -> None:
        self.module, self.own, self.join = module, module.forward, join
        self.down: QuantizedLinear = getattr(module, names.down)
        called = {names.gate, names.up, names.act, names.down}
        self.children = {name: child for name, child in module.named_children() if name in called}
        self.forwards = {name: vars(child).get("forward") for name, child in self.children.items()}

    def untouched(self) -> bool:
        """Whether the module's own forward would do what is done here: call these children, as they were."""
        now, forwards = self.module._modules, self.forwards
        return all(now.get(name) is child and untouched(child, forwards[name]) for name, child in self.children.items())

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self.untouched() or not self.join.connected():
            return self.own(x)
        gate_up = self.join.compute(x)
        flat = gate_up.reshape(-1, gate_up.shape[-1])
        codes, scale = swiglu_quantize(flat, group=bool(self.down.grouped(flat.shape[0])))
        return self.down.matmul(codes, scale, x.dtype).reshape(*x.shape[:-1], self.down.out_features)


class FusedNorm:
    """The `forward` of an RMSNorm that, once a joined layer has asked for it, also quantizes what it returns."""

    def __init__(self, norm: nn.Module, eps: float, offset: float, mailbox: Mailbox) -> None:
        self.norm, self.eps, self.offset, self.mailbox = norm, eps, offset, mailbox
        self.own = norm.forward
        self.feeds: type[QuantizedLinear] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.own(x)
        quantized, heard = None, bool(self.norm._forward_hooks)  # hooks may change what they are given
        if self.feeds is not None and not heard:
            flat, weight = x.reshape(-1, x.shape[-1]), self.norm.get_parameter("weight")
            group = bool(self.feeds.grouped(flat.shape[0]))
            out, codes, scale = rmsnorm_quantize(flat, weight, self.eps, offset=self.offset, group=group)
            out, quantized = out.reshape(x.shape), (codes, scale)
        else:
            out = self._plain(x)
        self.mailbox.note = None if heard else Note(weakref.ref(out), _version(out), self, self.feeds, quantized)
        return out

    def _plain(self, x: Tensor) -> Tensor:
        """The norm alone, on a GPU in one launch instead of six; rounded once, as with codes: the first forward, before
        norms have learnt whom they feed, gives the bits of all others."""
        weight = self.norm.get_parameter("weight")
        if x.dtype != weight.dtype:
            return self.own(x)
        return rmsnorm(x, weight, self.eps, offset=self.offset)


def _fuse_norm(module: nn.Module, mailbox: Mailbox) -> bool:
    if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):
        return False
    offset, eps = norm_offset(module), epsilon(module)
    if offset is None or eps is None:
        return False
    module.forward = FusedNorm(module, eps, offset, mailbox)
    return True
