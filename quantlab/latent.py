"""Models with multi-head latent attention: a packed cache of latents, and decoding that never expands it.

transformers caches one latent per token and expands all of them to keys and values of every head at every step. A
decoding step here multiplies queries by the keys' half of that expansion instead, attends over the packed latents
themselves, and multiplies the result by the values' half: the same sums in another order (DeepSeek-V2, arXiv
2405.04434). A prompt keeps the expanded way, which needs fewer operations when queries are many; where the two meet is
computed (`crossover`).

No model is known by name. Attention modules that take part cache what they hand to their `expand_kv`, which is
replaced by one that lets our handle pass; what the module expands is found by expanding the unit vectors (a quantized
projection is dequantized for it) and then held against the module on random latents. Whatever does not fit is refused.

Codes in equal steps, INT8 and INT4, want latents turned by an orthogonal matrix, which spreads outliers. It is folded
into the projections around them; where those are quantized, each new latent is turned as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from quantlab.cache_layers import KV, DynamicPackedLayer, Handle, PackedLayer, StaticPackedLayer
from quantlab.errors import UsageError
from quantlab.formulas import epsilon, norm_offset
from quantlab.linear import Fp8BlockLinear, QuantizedLinear
from quantlab_calib.rotate import hadamard
from quantlab_kernels import bmm_fp8, mla_append, mla_decode, mla_step, rmsnorm
from quantlab_kernels.bmm_fp8 import op as bmm_fp8_op
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.heads import bmm_heads
from quantlab_kernels.common.latent import FORMATS, PackedLatent, dequantize_latent, quantize_latent

_ABSORBED = "quantlab_absorbed"  # of an attention module: `Absorbed`
_TURNED = "quantlab_turned"  # of an attention module: its weights make latents that are turned
_EQUAL_STEPS = ("int8", "int4")  # formats whose rows should have no outliers
_ALIKE = 0.1  # how far expansion may be from our reading of it: quantized projections round what they multiply
_OTHERWISE = {  # attributes of attention modules that do more than attend to all that is cached
    "indexer": "it picks the tokens that it attends to (sparse attention)",
    "is_kv_shared_layer": "its layers share latents",
    "sinks": "it has attention sinks",
}


def modules(model: nn.Module) -> Iterator[nn.Module]:
    """Attention modules that cache latents."""
    return (module for module in model.modules() if callable(getattr(module, "expand_kv", None)))


def unsupported(model: Any) -> str | None:
    """Why a model's latent attention cannot read a packed cache, or None; looks at its classes alone."""
    found = list(modules(model))
    if not found:
        return "this version of transformers does not cache its latents"
    for module in found:
        for name, reason in _OTHERWISE.items():
            if getattr(module, name, None) not in (None, False):
                return reason
        names = unwrap(type(module).forward).__code__.co_names
        if "update" not in names or "expand_kv" not in names or names.index("update") > names.index("expand_kv"):
            return "this version of transformers caches keys and values of every head, not latents"
    return None


def require_format(name: str) -> None:
    """Raise UsageError for a format of keys and values that latents do not have."""
    if name not in FORMATS:
        raise UsageError(f"kv={name}: latents are keys and values at once; there are {', '.join(FORMATS)}")


def use(model: Any, kv: KV | str) -> KV:
    """Prepare the attention modules of a model for packed latents; returns the setting of the cache.

    Raises UsageError for settings that latents do not have, and for modules that expand latents in a way not known.
    """
    name = kv.format if isinstance(kv, KV) else kv
    require_format(name)
    kv = kv if isinstance(kv, KV) else KV(name)  # type: ignore[arg-type]
    if kv.first or kv.newest:
        raise UsageError(f"first = {kv.first}, newest = {kv.newest}: all latents are kept alike; leave both out")
    for path, module in model.named_modules():
        if callable(getattr(module, "expand_kv", None)):
            prepare(path, module, turn=name in _EQUAL_STEPS)
    return kv


def release(model: nn.Module) -> None:
    """Take back what `use` did; weights that were turned stay, and compute the same."""
    for module in modules(model):
        for name in ("expand_kv", _ABSORBED):
            module.__dict__.pop(name, None)
        norm: Any = getattr(module, "kv_a_layernorm", None)
        if norm is not None and getattr(vars(norm).get("forward"), "func", None) is _norm_at_once:
            del norm.forward


def prepare(path: str, module: Any, turn: bool) -> None:
    """Bind the absorbed expansion and an `expand_kv` that lets handles pass to one attention module."""
    release(module)
    matrix = None
    if turn and not _fold(module):
        matrix = hadamard(module.kv_b_proj.in_features)
    absorbed = Absorbed(module, matrix)
    error = absorbed.error()
    if not error < _ALIKE:
        raise UsageError(
            f"{path}: {type(module).__name__} expands latents in a way not known ({error:.0%} off); leave out kv"
        )
    setattr(module, _ABSORBED, absorbed)
    module.expand_kv = partial(_expand, module)  # bound methods cannot be pickled under another name
    norm = module.kv_a_layernorm
    if "forward" not in vars(norm) and norm_offset(norm) == 0:
        norm.forward = partial(_norm_at_once, norm)


def _norm_at_once(self: Any, x: Tensor) -> Tensor:
    """`forward` of a plain RMSNorm in one launch instead of seven; the compiler fuses those by itself."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return type(self).forward(self, x)
    return rmsnorm(x, self.weight, epsilon(self) or 0.0)


def _expand(self: Any, latent: Any, rope: Any) -> tuple[Any, Any]:
    """`expand_kv` of a prepared module: handles go on to attention as they are."""
    if isinstance(latent, LatentHandle):
        latent.absorbed = absorbed_of(self)
        return latent, latent
    return type(self).expand_kv(self, latent, rope)


def absorbed_of(module: Any) -> Absorbed:
    """What `prepare` has bound to a module; read anew where its projection was replaced, changed, cast or moved since,
    which a compiled graph does not ask."""
    found: Absorbed = getattr(module, _ABSORBED)
    if torch.compiler.is_compiling() or found.state == _state(module):
        return found
    turn = None if found.turn is None else hadamard(found.latent)
    found = Absorbed(module, turn, found.asked)
    setattr(module, _ABSORBED, found)
    return found


def _state(module: Any) -> tuple[Any, ...]:
    """What differs once a module expands latents in another way: adapters, weights, dropout of either."""
    projection = module.kv_b_proj
    weights = (*projection.parameters(), *projection.buffers())
    versions = ((x.data_ptr(), x.dtype, None if x.is_inference() else x._version) for x in weights)
    return id(projection), projection.training, *versions


def _as_held(method: Callable[[Absorbed], Any]) -> Callable[[Absorbed], Any]:
    """`method` in the dtypes of what it reads, also where its caller asks torch to choose others, and no gradients."""

    @wraps(method)
    def exact(self: Absorbed) -> Any:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return method(self)

    return exact


class Absorbed:
    """What a module's expansion multiplies latents by, for queries and for results.

    module   has `expand_kv`: latents [B, 1, S, L] and position parts [B, 1, S, R] to keys [B, H, S, nope + R] and
             values [B, H, S, V]
    turn     [L, L], orthogonal: cached latents are turned by it; None where the module makes turned ones
    codes    whether FP8 codes that the projection holds are multiplied as they are, where they are all of it; None
             does so where there is a kernel
    keys     [H, nope, L], values [H, L, V], in the dtype in which the module computes; as large as a 16-bit projection,
             which stays for prompts. None of both where codes are multiplied.
    """

    def __init__(self, module: Any, turn: Tensor | None = None, codes: bool | None = None) -> None:
        self.module, self.rope = module, module.qk_rope_head_dim
        self.asked, self.state = codes, _state(module)
        weight = next(module.kv_a_layernorm.parameters())  # a projection may hold codes
        self.device, self.dtype = weight.device, weight.dtype
        self.turn = None if turn is None else turn.to(self.device, self.dtype)
        self.keys: Tensor | None
        self.values: Tensor | None
        keys, values = self.matrices()
        self.heads, self.nope, self.latent = keys.shape
        self.v = values.shape[2]
        self.crossover = crossover(self.nope, self.v, self.latent)
        wanted = self._has_kernel() if codes is None else codes
        self.codes = wanted and self._are_codes(keys, values)
        self.keys, self.values = (None, None) if self.codes else (keys, values)

    @_as_held
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Keys [H, nope, L] and values [H, L, V] as the module expands them."""
        latent = self.module.kv_b_proj.in_features
        with _dequantized(self.module):
            key, value = self._expanded(torch.eye(latent, dtype=self.dtype, device=self.device))
            keys = self.turned(key[0, :, :, : -self.rope].transpose(1, 2)).contiguous()
            return keys, self.turned(value[0].transpose(1, 2)).transpose(1, 2).contiguous()

    def _are_codes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether keys and values are what the projection's codes stand for, head by head, and nothing else."""
        projection = self.module.kv_b_proj
        if type(projection) is not Fp8BlockLinear or projection.bias is not None or self.turn is not None:
            return False
        both = torch.cat((keys, values.transpose(1, 2)), 1).flatten(0, 1)
        return torch.equal(both, projection.dequantize(self.dtype))

    def _has_kernel(self) -> bool:
        """Whether a GPU has a kernel that reads codes; elsewhere they would be dequantized in every step."""
        if self.device.type != "cuda":
            return False
        rows, sm = self.nope + self.v, gpu(self.device.index or 0).sm
        problems = (
            bmm_fp8_op.Problem(1, self.heads, rows, self.latent, first, count, first > 0, self.dtype, sm)
            for first, count in ((0, self.nope), (self.nope, self.v))
        )
        backends = [v.backend for problem in problems for v in bmm_fp8_op.BACKENDS.explain(problem) if v.chosen]
        return "eager" not in backends

    def _expanded(self, latent: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The module's own keys [1, H, S, nope + R] and values [1, H, S, V] of latents [S, L]."""
        rope = latent.new_zeros(len(latent), self.rope) if rope is None else rope
        return type(self.module).expand_kv(self.module, latent[None, None], rope[None, None])

    @_as_held
    def error(self) -> float:
        """How far the module's keys and values of random latents are from ours, relative to their size."""
        generator = torch.Generator().manual_seed(0)
        latent = torch.randn(8, self.latent, generator=generator).to(self.device, self.dtype)
        rope = torch.randn(8, self.rope, generator=generator).to(self.device, self.dtype)
        key, value = self._expanded(latent, rope)
        if not torch.equal(key[..., -self.rope :], rope.expand_as(key[..., -self.rope :])):
            return math.inf
        turned = self.turned(latent)
        keys, values = self.matrices() if self.keys is None or self.values is None else (self.keys, self.values)
        ours = torch.cat((turned @ keys.transpose(1, 2), turned @ values), -1).float()
        theirs = torch.cat((key[0, ..., : -self.rope], value[0]), -1).float()
        return float((ours - theirs).norm() / theirs.norm()) if float(theirs.norm()) else 0.0

    def turned(self, latent: Tensor) -> Tensor:
        return latent if self.turn is None else latent @ self.turn

    def unturned(self, latent: Tensor) -> Tensor:
        return latent if self.turn is None else latent @ self.turn.T

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, Sq, nope + R] to queries of latents [B, Sq, H, L] and of positions [B, Sq, H, R]."""
        plain, rope = query.transpose(1, 2).split([self.nope, self.rope], -1)
        return self.absorb(plain), rope

    def absorb(self, plain: Tensor) -> Tensor:
        """Queries without their position parts, [B, Sq, H, nope], to queries of latents [B, Sq, H, L]."""
        return self._multiplied(plain, self.keys, 0, self.nope, False)

    def results(self, out: Tensor) -> Tensor:
        """[B, Sq, H, L] to [B, Sq, H, V]."""
        return self._multiplied(out, self.values, self.nope, self.v, True)

    def _multiplied(self, x: Tensor, matrix: Tensor | None, first: int, count: int, transposed: bool) -> Tensor:
        """x [B, Sq, H, K] by each head's matrix [H, K, N], or by the rows of the projection that it is made of."""
        batch, tokens = x.shape[:2]
        rows = x.flatten(0, 1)
        if matrix is None:
            weight = self.module.kv_b_proj
            out = bmm_fp8(rows, weight.weight, weight.scale, first=first, count=count, transposed=transposed)
        else:
            matrix = matrix.to(rows.dtype)  # under autocast rows may be in another
            out = bmm_heads(rows, matrix) if transposed else (rows.transpose(0, 1) @ matrix).transpose(0, 1)
        return out.unflatten(0, (batch, tokens))


def crossover(nope: int, v: int, latent: int) -> int:
    """Queries of a sequence from which expanding what is cached needs fewer operations than absorbing.

    Per cached token and head, expanding takes L (nope + V) multiplications once and nope + R + V for each query,
    absorbing 2 L + R for each query.
    """
    more = 2 * latent - nope - v
    return latent * (nope + v) // more if more > 0 else 1 << 30


@contextmanager
def _dequantized(module: Any) -> Iterator[None]:
    """A quantized projection in 16 bits meanwhile, so that what it multiplies is not rounded."""
    projection = module.kv_b_proj
    if isinstance(projection, QuantizedLinear):
        weight = projection.dequantize(next(module.kv_a_layernorm.parameters()).dtype)
        module.kv_b_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.kv_b_proj.weight, module.kv_b_proj.bias = nn.Parameter(weight, False), projection.bias
    try:
        yield
    finally:
        module.kv_b_proj = projection


class LatentHandle(Handle):
    """What `update` gives in place of latents and position parts; `expand_kv` says whose they are."""

    absorbed: Absorbed | None = None

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float | None, kwargs: dict[str, Any], training: bool = False
    ) -> Tensor | None:
        """As `Handle.attend`, out [B, Sq, H, V]."""
        for name in ("position_bias", "softcap", "s_aux", "indices", "sliding_window"):
            if kwargs.get(name) is not None:
                raise UsageError(f"attention is given {name}, which attention over packed latents lacks; leave out kv")
        absorbed, layer = self._absorbed(), self.layer
        if layer.few != absorbed.crossover:
            layer.few = absorbed.crossover
        latent, self.own = absorbed.turned(self.key), self.key
        self.key = latent
        return super().attend(query, mask, scaling, kwargs, training)

    def over_packed(self, query: Tensor, scaling: float | None, kwargs: dict[str, Any]) -> Tensor:
        absorbed, layer = self._absorbed(), self.layer
        cache: Any = layer.cache
        q_latent, q_rope = absorbed.queries(query)
        out, _ = mla_decode(
            q_latent, q_rope, cache, layer.length, scale=query.shape[3] ** -0.5 if scaling is None else scaling,
            start=layer.start, longest=layer.longest,
        )  # fmt: skip
        return absorbed.results(out)

    def dense(self, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of every head, expanded from all latents; the mask cut to them."""
        absorbed = self._absorbed()
        latent, rope, mask = super().dense(mask)
        # A prompt's own latents, which were not cut and only turned, are at hand as they came.
        exact = latent.shape == self.own.shape and self.layer.kv.prefill == "exact"
        latent = self.own if exact else absorbed.unturned(latent)
        key, value = type(absorbed.module).expand_kv(absorbed.module, latent, rope)
        return key, value, mask

    def _absorbed(self) -> Absorbed:
        if self.absorbed is None:
            raise UsageError("latents came to attention without `expand_kv`; leave out kv")
        return self.absorbed


class LatentLayer(PackedLayer):
    """What growing and static layers of latents have in common."""

    cache: Any  # PackedLatent
    handle = LatentHandle
    held = ("latent", "rope", "scale")
    beside = ()
    slots_at = 1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, tokens, latent = key_states.shape
        if batch == 0:
            raise UsageError("an empty batch: the quantized cache needs one sequence at least")
        if heads != 1 or value_states.shape[:3] != key_states.shape[:3]:
            raise UsageError(
                f"keys {tuple(key_states.shape)} and values {tuple(value_states.shape)}: needs a latent and a part for "
                "the position, alike for all heads; leave out kv"
            )
        if latent % 2 and self.kv.format == "int4":
            raise UsageError(f"latents of {latent} channels: kv=int4 needs an even number; take fp8 or int8")
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.heads = heads, latent
        self.cache = PackedLatent.empty(
            self.kv.format, batch, self._slots(tokens), latent, value_states.shape[3], dtype=self.dtype,  # type: ignore[arg-type]
            device=self.device,
        )  # fmt: skip
        self.length = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.start = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def append(self, key: Tensor, value: Tensor) -> None:
        """Quantize latents [B, 1, S, L] and write them, with position parts [B, 1, S, R], behind the others."""
        self.length.add_(key.shape[2])
        mla_append(key[:, 0], value[:, 0].to(key.dtype), self.cache, self.length)
        self.filled = True

    def step(self, query: Tensor, latent: Tensor, rope: Tensor, layout: tuple[bool, bool], **given: Any) -> Tensor:
        """Write one token, as its projection made it, and turn queries [B, 1, H, R] of it (`mla_step`)."""
        self._thaw()
        self._reserve(1)
        interleaved, kept = layout
        return mla_step(
            query, latent, rope, self.cache, self.length, interleaved=interleaved, kept_interleaved=kept, **given
        )

    def round_trip(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        codes = quantize_latent(key.float(), FORMATS[self.kv.format], self.dtype)
        return dequantize_latent(*codes, torch.float32).to(self.dtype), value

    def dequantized(self, slots: Any) -> tuple[Tensor, Tensor]:
        """Latents [B, 1, slots, L] and position parts [B, 1, slots, R] of a slice of slots."""
        c = self.cache
        scale = None if c.scale is None else c.scale[:, slots]
        latent = dequantize_latent(c.latent[:, slots], scale, torch.float32).to(self.dtype)
        return latent[:, None], c.rope[:, None, slots]


class DynamicLatentLayer(DynamicPackedLayer, LatentLayer):
    """Grows by blocks."""

    def step(self, *args: Any, **given: Any) -> Tensor:
        queries = super().step(*args, **given)
        self._appended = self.tokens
        return queries


class StaticLatentLayer(StaticPackedLayer, LatentLayer):
    """As long as it will ever be, at fixed addresses."""


def layer_like(layer: Any, kv: KV, keys: None = None) -> Any:
    """A layer of packed latents in the shape of transformers' own. Raises UsageError for kinds that hold others."""
    made: PackedLayer
    match type(layer).__name__ if type(layer).__module__ == Cache.__module__ else "":
        case "DummyLayer":  # of a layer without attention
            return layer
        case "DynamicLayer":
            made = DynamicLatentLayer(kv)
        case "StaticLayer":
            made = StaticLatentLayer(kv, layer.max_cache_len)
        case _:
            raise UsageError(f"cache layers of kind {type(layer).__name__} hold no plain latents; leave out kv")
    if layer.is_initialized and layer.keys is not None:
        made.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
    return made


@torch.no_grad()
def _fold(module: Any) -> bool:
    """Turn the latents of a module whose projections are plain: False, and nothing done, where they are not.

    The norm's weights go into the columns of `kv_b_proj`; what is left of the norm commutes with turning, so the matrix
    goes into the latents' rows of `kv_a_proj_with_mqa` and the columns of `kv_b_proj`. In float64.
    """
    before, norm, after = (getattr(module, n, None) for n in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))
    if getattr(module, _TURNED, False):
        return True
    if type(before) is not nn.Linear or type(after) is not nn.Linear or norm is None or norm_offset(norm) != 0:
        return False
    size = after.in_features
    turn = hadamard(size).to(after.weight.device)
    after.weight.copy_((after.weight.double() * norm.weight.double()) @ turn)
    norm.weight.fill_(1)
    for parameter in (before.weight, before.bias):
        if parameter is not None:
            parameter[:size].copy_(turn.T @ parameter[:size].double())
    setattr(module, _TURNED, True)
    return True
