"""The quantized KV cache as transformers sees it: layers whose `update` keeps tokens packed, down to attention.

A layer's `update` returns a handle in place of keys and values, and our attention function (`quantlab.attention`)
asks the handle: a few queries go over the packed tokens by `attention_decode`; a prompt attends to its own 16-bit keys,
which are at hand, cost nothing and lose nothing. A handle is no tensor, so a model that computes on cached keys itself
fails with a clear error where a tensor of another meaning would be silently wrong.

What keys need to survive few bits is two numbers per channel (`quantlab_calib.rope`): their mean, which softmax does
not see, and how far they stray from it, which is folded into queries. They are measured as the model is prepared, on
a few short texts run at all places of the context. Nothing in the weights changes and no kind of rotary embedding has
to be known. Statistics of each prompt (the alternative) are as good for the prompt itself, and useless for what is
written after a short one. Losses of all ways are in `calib/README.md`.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from quantlab import checkpoint, decoding, kinds, latent, latent_step
from quantlab import keys as kept_keys
from quantlab.architecture import meta_model
from quantlab.cache_layers import (
    FEW,
    KV,
    DynamicPackedLayer,
    Handle,
    PackedLayer,
    StaticPackedLayer,
    WindowPackedLayer,
)
from quantlab.errors import PreflightError, UsageError
from quantlab.keys import Keys, channel_scale
from quantlab.source_patterns import computes_on_cached
from quantlab_calib import rope

__all__ = [
    "FEW", "KV", "PackedCache", "Prepared", "channel_scale", "load_keys", "new_cache", "packed", "prepared",
    "save_keys", "use",
]  # fmt: skip

_PREPARED = "quantlab_kv"  # of a model: `Prepared`
_PREPARE = "_prepare_cache_for_generation"
_SAVE = "save_pretrained"


def packed(key: Any) -> Handle | None:
    """The handle that `update` of a layer of ours returned, or None for keys as tensors."""
    return key if isinstance(key, Handle) else None


@dataclass(frozen=True)
class Prepared:
    """A format and what the keys of a model need for it: mean and scale of each layer's channels.

    latent   the model caches latents
    sample   of the weights that keys were measured on
    """

    kv: KV
    keys: dict[int, Keys]
    latent: bool = False
    sample: Tensor | None = None

    def like(self, cache: Cache) -> PackedCache:
        """An empty quantized cache in the shape of one of transformers'."""
        if self.latent:
            return PackedCache.like(cache, self.kv, make=latent.layer_like)
        return PackedCache.like(cache, self.kv, self.keys)


def use(model: Any, kv: KV | str | None, tokens: Tensor | None = None, keys: dict[int, Keys] | None = None) -> Any:
    """Let `model.generate` make quantized caches, dynamic or static as it is asked for; None takes that back.

    tokens  [pieces, length] int64: texts to measure keys on, by default random tokens
    keys    what was measured before, from `load_keys`; then nothing is measured

    Masks may hide anything. In a forward that was compiled whole (`torch.compile(model)`; `generate` compiles steps
    alone) only left padding, all of it in a sequence's first call: what else a mask hides, later steps attend to.

    Gradients reach the tokens of a call, none that were cached by an earlier one. Calls of few tokens have them in
    training only (`model.train()`), where they are slower; else `backward` says so.

    Latents in `int8` and `int4` are turned by the projections around them where these are not quantized, whose weights
    change in place: adapters that were made for the weights as they were go in before.

    A cache that is given to `generate` or to the model itself stays what it is; `new_cache` makes one of ours. The
    model's `save_pretrained` carries what was measured. Returns the model. Raises UsageError for models whose attention
    cannot read a quantized cache.
    """
    for name in (_PREPARE, _PREPARED, _SAVE):
        model.__dict__.pop(name, None)
    latent_step.restore(model)
    latent.release(model)
    if kv is None or kv == "none":
        return model
    reason = _unsupported(model)
    if reason is not None:
        raise UsageError(f"{type(model).__name__} cannot have a quantized KV cache: {reason}; leave out kv")
    latents = _caches_latents(model)
    kv = latent.use(model, kv) if latents else KV.of(kv)
    if not str(model.config._attn_implementation).startswith("quantlab"):
        model.set_attn_implementation("quantlab")
    if latents:
        latent_step.shorten(model)
    if latents or kv.format == "16bit":
        keys = {}
    elif keys is None:
        keys = _keys(model, tokens)
    elif not set(keys) <= set(range(model.config.get_text_config(decoder=True).num_hidden_layers)):
        raise UsageError(f"keys of layer {max(keys)} were measured, which {type(model).__name__} does not have")
    setattr(model, _PREPARED, Prepared(kv, keys, latents, _sample(model) if keys else None))
    setattr(model, _PREPARE, partial(_prepare, model))  # bound methods cannot be pickled under another name
    setattr(model, _SAVE, partial(_save, model))
    decoding.stop_late(model)
    return model


def prepared(model: Any) -> Prepared | None:
    """What `use` has left on a model."""
    return getattr(model, _PREPARED, None)


def new_cache(model: Any) -> Cache:
    """An empty growing cache for a model that `use` has prepared, or else transformers' own."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    found = prepared(model)
    return cache if found is None else found.like(cache)


def save_keys(model: Any, folder: str | Path) -> Path:
    """Write what was measured on keys beside the model's checkpoint, where `quantlab.load` finds it; returns the path.

    One safetensors file (`quantlab.keys`), which other loaders do not read. It is for the weights that lie in the
    folder: give the one that the model was loaded from or saved to. Raises UsageError for a model without a quantized
    cache, and for a folder that holds no checkpoint.
    """
    found, path = prepared(model), Path(folder) / checkpoint.KEY_STATISTICS
    if found is None or not found.keys:
        raise UsageError("nothing was measured on this model's keys; load it with kv = 'fp8', 'int8', 'int4' or 'k8v4'")
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"{folder}: no config.json there; give the folder of the model's checkpoint")
    return kept_keys.write(path, found.keys, kept_keys.digest(folder))


def load_keys(folder: str | Path) -> dict[int, Keys] | None:
    """What was kept beside a checkpoint; None where nothing was, or with a warning where it is of other weights.

    Raises UsageError for a file that is not whole.
    """
    return kept_keys.load(folder)


def _keys(model: Any, tokens: Tensor | None) -> dict[int, Keys]:
    size = model.config.get_text_config(decoder=True).vocab_size
    if tokens is None:
        tokens = torch.randint(size, (rope.PIECES, rope.PIECE), generator=torch.Generator().manual_seed(0))
    if tokens.ndim != 2 or not tokens.numel() or tokens.dtype != torch.int64:
        raise UsageError(
            f"tokens are {list(tokens.shape)} {tokens.dtype}: needs [pieces, length] int64, none of them 0"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise UsageError(f"tokens from {int(tokens.min())} to {int(tokens.max())}: the model knows 0 to {size - 1}")
    try:
        found = rope.key_statistics(model, tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{type(model).__name__} cannot have a quantized KV cache: it does not run at given places ({reason})"
        ) from None
    return kept_keys.of_statistics(found)


@torch.no_grad()
def _sample(model: Any) -> Tensor:
    """A few numbers of every weight but routed experts', which say whether the model was changed. Devices and dtypes
    may change."""
    found = []
    for name, weight in model.named_parameters():
        if not weight.is_meta and weight.numel() and kinds.experts_of(checkpoint.module_of(name)) is None:
            few = weight.detach()[(0,) * (weight.ndim - 1)].reshape(-1)[:8]  # of the first row
            found.append((few.view(torch.uint8) if few.element_size() == 1 else few).to(torch.bfloat16).cpu())
    return torch.cat(found) if found else torch.empty(0)


def _save(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' own saving, and then what was measured on keys, for the weights as they were written, and the
    recipe."""
    result = getattr(type(self), _SAVE)(self, save_directory, *args, **kwargs)
    found = prepared(self)
    if found is None or not kwargs.get("is_main_process", True):
        return result
    recipe, saved = (Path(folder) / checkpoint.RECIPE for folder in (self.name_or_path, save_directory))
    if recipe.is_file() and not saved.exists():  # it names the format that loading takes
        saved.parent.mkdir(exist_ok=True)
        shutil.copyfile(recipe, saved)
    if found.sample is None:
        return result
    if torch.equal(found.sample, _sample(self)):
        save_keys(self, save_directory)
    else:
        warnings.warn(
            f"{save_directory}: weights were changed since keys were measured, which are not saved; "
            "quantlab.cache.use measures them again",
            kept_keys.StaleKeysWarning,
            stacklevel=2,
        )
    return result


def require_support(folder: Path, kv: str, trust_remote_code: bool = False) -> None:
    """Raise PreflightError for a model that `use` would refuse; looks at its config alone."""
    model = meta_model(folder, trust_remote_code)
    reason = "transformers does not know it" if model is None else _unsupported(model)
    if model is not None and reason is None and _caches_latents(model):
        latent.require_format(kv)
    if reason is not None:
        raise PreflightError(f"{folder}: the model cannot have a quantized KV cache: {reason}; leave out kv")


def _unsupported(model: Any) -> str | None:
    """Why a model's attention cannot read a quantized cache, or None."""
    config = model.config.get_text_config(decoder=True)
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return "it is no decoder that generates"
    if not model._supports_attention_backend:
        return "its attention does not go through transformers' interface"
    if _caches_latents(model) and (reason := latent.unsupported(model)) is not None:
        return reason
    own = [name for name, item in vars(sys.modules[type(model).__module__]).items() if _is_cache_of(model, item)]
    if own:
        return f"it has a cache of its own ({own[0]})"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked"
    layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    other = layers - {"DummyLayer", "DynamicLayer", "DynamicSlidingWindowLayer"}
    if other:
        return f"its cache has layers of kind {min(other)}"
    for module in () if _caches_latents(model) else model.modules():
        if computes_on_cached(type(module).forward):
            return f"its attention ({type(module).__name__}) computes on cached keys or values"
    if "max_cache_length" not in inspect.signature(getattr(type(model), _PREPARE)).parameters:
        return "this version of transformers prepares caches in another way"
    return None


def _is_cache_of(model: Any, item: Any) -> bool:
    """Whether it is a kind of cache, or of a layer of one, that the module of a model's class defines."""
    return (
        isinstance(item, type)
        and issubclass(item, (Cache, CacheLayerMixin))
        and item.__module__ == type(model).__module__
    )


def _caches_latents(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None))


def _prepare(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    mode: Any,
    batch_size: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' own preparation, and then a quantized cache in place of the one that it has just made."""
    if not str(self.config._attn_implementation).startswith("quantlab"):
        raise UsageError(
            f"attn_implementation is {self.config._attn_implementation!r} now, which cannot read a quantized cache: "
            "set quantlab, quantlab_int8 or quantlab_fp8, or give the cache up by quantlab.cache.use(model, None)"
        )
    implementation = generation_config.cache_implementation or ""
    if implementation == "quantized":
        raise UsageError("cache_implementation = 'quantized' is transformers' own: leave it out, or leave out kv")
    if implementation.startswith("offloaded"):  # without a GPU some versions of torch cannot even make such a cache
        raise UsageError(
            f"cache_implementation = {implementation!r}: the quantized cache stays on its GPU; leave it out, or "
            "leave out kv"
        )
    if batch_size == 0:
        raise UsageError("an empty batch: the quantized cache needs one sequence at least")
    given = model_kwargs.get("past_key_values")
    stock = getattr(type(self), _PREPARE)
    result = stock(self, generation_config, model_kwargs, mode, batch_size, *args, **kwargs)
    made = model_kwargs.get("past_key_values")
    if made is not None and made is not given:
        model_kwargs["past_key_values"] = getattr(self, _PREPARED).like(made)
    return result


class PackedCache(Cache):
    """A quantized cache for a whole model."""

    @classmethod
    def like(
        cls, cache: Cache, kv: KV | str, keys: dict[int, Keys] | None = None, make: Callable[..., Any] | None = None
    ) -> PackedCache:
        """Layers of the same kinds and lengths, by `make`(layer, kv, keys). Raises UsageError for other kinds."""
        kv, keys, make = KV.of(kv), keys or {}, make or _like
        if getattr(cache, "offloading", False):
            raise UsageError("an offloaded cache: the quantized cache stays on its GPU; give one without offloading")
        if not cache.layers:
            raise UsageError(f"{type(cache).__name__} names no layers; give it the model's config")
        return cls(layers=[make(layer, kv, keys.get(i)) for i, layer in enumerate(cache.layers)])


def _like(layer: Any, kv: KV, keys: Keys | None) -> Any:
    made: PackedLayer
    match type(layer).__name__ if type(layer).__module__ == Cache.__module__ else "":
        case "DummyLayer":  # of a layer without attention
            return layer
        case "DynamicLayer":
            made = DynamicPackedLayer(kv, keys)
        case "DynamicSlidingWindowLayer":
            made = WindowPackedLayer(kv, layer.sliding_window, keys)
        case "StaticLayer":
            made = StaticPackedLayer(kv, layer.max_cache_len, keys)
        case "StaticSlidingWindowLayer":
            made = WindowPackedLayer(kv, layer.max_cache_len, keys, static=True)
        case _:
            kind = type(layer).__name__
            raise UsageError(
                f"cache layers of kind {kind}: full and sliding-window attention can be quantized; leave out kv"
            )
    if layer.is_initialized and layer.keys is not None:
        made.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
    return made
