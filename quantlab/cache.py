"""The quantized KV cache as transformers sees it: layers whose `update` keeps tokens packed, down to attention.

A layer's `update` returns a handle in place of keys and values, and our attention function (`quantlab.attention`)
asks the handle: a few queries go over the packed tokens by `attention_decode`; a prompt attends to its own 16-bit keys,
which are at hand, cost nothing and lose nothing. A handle is no tensor, so a model that computes on cached keys itself
fails with a clear error where a tensor of another meaning would be silently wrong.

What keys need to survive few bits is measured on the prompt: their mean per channel, which softmax does not see, and
for INT4 how far each channel strays from it, which is folded into queries. So there is nothing to calibrate, rotary
embeddings of any kind need not be known, and nothing in the weights changes. The statistics of a prompt hold for what
follows it; alternatives and their losses are in `calib/README.md`.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from quantlab.cache_layers import KV, DynamicPackedLayer, Handle, PackedLayer, StaticPackedLayer, WindowPackedLayer
from quantlab.errors import UsageError

__all__ = ["KV", "PackedCache", "packed", "use"]

_PREPARE = "_prepare_cache_for_generation"


def packed(key: Any) -> Handle | None:
    """The handle that `update` of a layer of ours returned, or None for keys as tensors."""
    return key if isinstance(key, Handle) else None


def use(model: Any, kv: KV | str | None) -> Any:
    """Let `model.generate` make quantized caches, dynamic or static as it is asked for; None takes that back.

    A cache that is given to `generate` or to the model itself stays what it is: `PackedCache.like` makes one of ours.
    Returns the model. Raises UsageError for models whose attention cannot read a quantized cache.
    """
    if kv is None:
        model.__dict__.pop(_PREPARE, None)
        model.__dict__.pop("quantlab_kv", None)
        return model
    kv = KV.of(kv)
    _require_support(model)
    if not str(model.config._attn_implementation).startswith("quantlab"):
        model.set_attn_implementation("quantlab")
    model.quantlab_kv = kv
    setattr(model, _PREPARE, types.MethodType(_prepare, model))
    return model


def _require_support(model: Any) -> None:
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    reason = None
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        reason = "it is no decoder that generates"
    elif not model._supports_attention_backend:
        reason = "its attention does not go through transformers' interface"
    elif getattr(config, "kv_lora_rank", None):
        reason = "its cache is to be that of latent attention"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "its layers share keys and values"
    elif "max_cache_length" not in inspect.signature(getattr(type(model), _PREPARE)).parameters:
        reason = "this version of transformers prepares caches in another way"
    if reason is not None:
        raise UsageError(f"{name} cannot have a quantized KV cache: {reason}; load it without kv")
    if getattr(config, "attention_chunk_size", None):
        raise UsageError(f"{name} cannot have a quantized KV cache: its attention is chunked; load it without kv")


def _prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """transformers' own preparation, and then a quantized cache in place of the one that it has just made."""
    given = model_kwargs.get("past_key_values")
    result = getattr(type(self), _PREPARE)(self, generation_config, model_kwargs, *args, **kwargs)
    made = model_kwargs.get("past_key_values")
    if made is not None and made is not given:
        model_kwargs["past_key_values"] = PackedCache.like(made, self.quantlab_kv)
    return result


class PackedCache(Cache):
    """A quantized cache in the shape of one of transformers': `PackedCache.like(DynamicCache(config=config), kv)`."""

    @classmethod
    def like(cls, cache: Cache, kv: KV | str) -> PackedCache:
        """Layers of the same kinds and lengths. Raises UsageError for kinds that cannot be quantized."""
        kv = KV.of(kv)
        if getattr(cache, "offloading", False):
            raise UsageError("cache_implementation is an offloaded one: the quantized cache stays on its GPU")
        if not cache.layers:
            raise UsageError(f"{type(cache).__name__} names no layers; give it the model's config")
        return cls(layers=[_like(layer, kv) for layer in cache.layers])


def _like(layer: Any, kv: KV) -> Any:
    made: PackedLayer
    match type(layer).__name__, layer:
        case "DummyLayer", DummyLayer():
            return layer
        case "DynamicLayer", DynamicLayer():
            made = DynamicPackedLayer(kv)
        case "DynamicSlidingWindowLayer", DynamicSlidingWindowLayer():
            made = WindowPackedLayer(kv, layer.sliding_window)
        case "StaticLayer", StaticLayer():
            made = StaticPackedLayer(kv, layer.max_cache_len)
        case "StaticSlidingWindowLayer", StaticSlidingWindowLayer():
            made = WindowPackedLayer(kv, layer.max_cache_len)
        case name, _:
            raise UsageError(
                f"cache layers of kind {name}: full and sliding-window attention can be quantized; load without kv"
            )
    if layer.is_initialized and layer.keys is not None:
        made.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
    return made
