"""Attention of transformers' models on our kernels: `quantlab`, `quantlab_int8` and `quantlab_fp8`.

One attention function under three names, chosen by ``attn_implementation``, and one mask function under the same names
(transformers makes no mask at all for an implementation without one, and padded batches would be silently wrong).

    quantlab       16-bit prefill by SDPA; quantized caches and decoding by our kernels
    quantlab_int8  prefill with INT8 codes of queries, keys and values
    quantlab_fp8   the same with E4M3 codes

What 8 bits cannot do, or not faster, goes to SDPA, call by call, and each reason is said once. Soft caps and sinks,
which SDPA does not know, are computed in plain torch then, never left out.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantlab import cache, masks
from quantlab.errors import UsageError
from quantlab.linear import as_autocast
from quantlab.masks import Visible
from quantlab.source_patterns import computes_on_mask
from quantlab_kernels import attention_8bit
from quantlab_kernels.attention_quantize.op import HEAD_DIMS, Format

CODES: dict[str, Format | None] = {"quantlab": None, "quantlab_int8": "int8", "quantlab_fp8": "fp8"}
# Head dimension -> keys from which 8 bits, quantization included, beat cuDNN in 16 on an H200. Of heads of 64 channels
# only the kernel alone was measured, 5 to 9 % faster at 16384 keys; others were not.
FASTER_FROM = {128: 4096}
_ASKED_FOR = "quantlab_attention_asked_for"  # of a model: its user named its attention
_BATCHING = "init_continuous_batching"
_PLAIN_ELEMENTS = 1 << 26  # scores that the plain way holds at a time
_measuring = threading.local()  # `least`: in place of these; the compiler does not trace a ContextVar
_said: set[tuple[str, str]] = set()


class AttentionFallback(UserWarning):
    """A call of 8-bit attention ran in 16 bits; the text says why. Given once per reason."""


def register() -> None:
    """Make the three names known to transformers."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for name, codes in CODES.items():
        AttentionInterface.register(name, _function(name, codes))
        AttentionMaskInterface.register(name, masks.create)


def share_keys(model: Any) -> bool:
    """Give a causal model that attends by SDPA, with several queries to a key, the same under the name `quantlab`.

    Where there is a mask, as for every token written with a static cache, transformers copies keys and values once per
    query head for SDPA; ours hands them over as they are. Continuous batching, which has paged kernels of its own, goes
    on with SDPA. Returns whether the model was one of these; one whose user asked for SDPA is not (`keep`), nor one
    whose attention computes on its mask, which ours may get as a padding mask.
    """
    if getattr(model, _ASKED_FOR, False):
        return False
    config: Any = getattr(model, "config", None)
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads < heads):
        return False
    if config._attn_implementation != "sdpa" or not model._supports_attention_backend or not model.can_generate():
        return False
    if any(computes_on_mask(type(module).forward) for module in model.modules()):
        return False
    model.set_attn_implementation("quantlab")
    setattr(model, _BATCHING, partial(_batch_continuously, model))  # bound methods cannot be pickled under another name
    return True


def keep(model: Any) -> None:
    """Leave a model the attention that its user asked for by name."""
    setattr(model, _ASKED_FOR, True)


def _batch_continuously(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`init_continuous_batching` of a model that `share_keys` changed: by SDPA, until its manager stops."""
    if cache.prepared(self) is not None:
        raise UsageError(
            "continuous batching keeps keys and values in pages of its own, in 16 bits: load the model without kv, or "
            "give its quantized cache up by quantlab.cache.use(model, None)"
        )
    ours = self.config._attn_implementation == "quantlab"
    if ours:
        self.set_attn_implementation("sdpa")
    manager = getattr(type(self), _BATCHING)(self, *args, **kwargs)
    if ours:
        manager._original_attn_impl = "quantlab"  # which it sets again when it stops
    return manager


def _function(name: str, codes: Format | None) -> Callable[..., tuple[Tensor, None]]:
    """What transformers calls under this name; codes None is 16 bits."""

    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query [B, Hq, Sq, D], key and value [B, Hkv, Skv, D] -> [B, Sq, Hq, D], None, as `sdpa_attention_forward`."""
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        held = cache.packed(key)
        if held is not None:
            query = as_autocast(query)
            out = held.attend(query, attention_mask, scaling, kwargs, module.training)
            if out is not None:
                return out, None
            key, value, attention_mask = held.dense(attention_mask)
        visible = _visible(query, key, attention_mask, causal, kwargs)
        if codes is not None:
            reason = _why_not(query, key, value, visible, dropout, kwargs)
            if reason is None and visible is not None:
                return _in_8_bits(codes, query, key, value, visible, scaling, kwargs), None
            _say(name, str(reason), query)
        if visible is not None and attention_mask is not None:
            attention_mask = visible.dense
            if held is not None and attention_mask is not None:  # a static cache's mask covers its empty part too
                attention_mask = attention_mask[..., : key.shape[2]]
        return _in_16_bits(module, query, key, value, attention_mask, dropout, scaling, causal, kwargs)

    return forward


def _visible(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]) -> Visible | None:
    """What the queries see as intervals; None for a dense mask."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or queries == 1:
            return Visible(keys, -1, -1, None, _packed(kwargs))
        # SDPA's reading of "causal" without a mask: query i sees keys up to i, also of a longer buffer.
        return Visible(queries, -1, 0, None, _packed(kwargs)) if queries <= keys else None
    found = masks.visible_of(mask)
    if found is not None or mask.ndim != 2:
        return found
    # A padding mask without its description, as after a move to another GPU: what flash attention makes of it.
    return _of_padding(query, key, mask, causal, kwargs.get("sliding_window"))


def _packed(kwargs: dict[str, Any]) -> Tensor | None:
    """Boundaries of packed sequences as a flattening collator hands them over."""
    boundaries = kwargs.get("cu_seq_lens_q")
    return None if boundaries is None else boundaries.to(torch.int32)


def _of_padding(query: Tensor, key: Tensor, mask: Tensor, causal: bool, window: int | None) -> Visible | None:
    from transformers import masking_utils

    function = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    if window is not None and causal:
        function = masking_utils.sliding_window_causal_mask_function(window)
    mask = mask[:, -key.shape[2] :]  # a sliding window has dropped the first
    given = {
        "batch_size": query.shape[0], "q_length": query.shape[2], "kv_length": mask.shape[1],
        "q_offset": mask.shape[1] - query.shape[2] if causal else 0, "kv_offset": 0, "mask_function": function,
        "attention_mask": mask.bool(), "allow_is_causal_skip": False, "device": query.device,
    }  # fmt: skip
    build = lambda: masking_utils.sdpa_mask(**given)  # noqa: E731
    found = masks.describe(given, build)
    return found if found is not None else Visible(key.shape[2], -1, -1, build=build)


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible | None, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """Why this call does not run in 8 bits, or None."""
    d = query.shape[3]
    if visible is None:
        return "the mask is more than limits, padding at the ends and packed sequences"
    if dropout > 0:
        return "attention dropout is on"
    if kwargs.get("position_bias") is not None:
        return "scores have a position bias"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "gradients are asked for"
    if d not in HEAD_DIMS or value.shape[3] != d:
        return f"heads of {d} and {value.shape[3]} channels; there are kernels for {', '.join(map(str, HEAD_DIMS))}"
    if query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16):
        return f"the model computes in {query.dtype}"
    if visible.cu_seqlens is not None and (query.shape[0] > 1 or query.shape[2] != visible.keys):
        return "packed sequences in a batch of more than one row"
    return _too_short(d, query.shape[2], visible, kwargs)


@contextmanager
def always() -> Iterator[None]:
    """8 bits also where they are slower, in this thread: for measuring what they cost."""
    before, _measuring.least = getattr(_measuring, "least", None), 0
    try:
        yield
    finally:
        _measuring.least = before


def _asked() -> int | None:
    """Keys from which the user wants 8 bits, None for no wish."""
    asked = os.environ.get("QUANTLAB_ATTENTION_MIN_TOKENS")
    if asked and not asked.isdecimal():
        raise UsageError(f"QUANTLAB_ATTENTION_MIN_TOKENS={asked!r}: needs a number of keys, 0 or more")
    return int(asked) if asked else None


def _too_short(d: int, queries: int, visible: Visible, kwargs: dict[str, Any]) -> str | None:
    """8 bits pay once the products outweigh quantizing keys and values."""
    least = getattr(_measuring, "least", None)
    if least is None:
        least = _asked()
    if least is None:
        least = FASTER_FROM.get(d)
    if queries == 1:
        return "a single query reads its keys once, quantizing them first would take longer"
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return None  # SDPA knows neither: the alternative is plain torch
    if least is None:
        return f"8 bits were not seen to be faster with heads of {d} channels"
    if visible.keys < least or 4 * queries < least:
        return f"{queries} queries and {visible.keys} keys are too few to be faster (from {least} keys on they are)"
    return None


def _say(name: str, reason: str, query: Tensor) -> None:
    """Once per kind of reason; the numbers in it are those of the first call. Decoding is no surprise to anybody."""
    if torch.compiler.is_compiling() or query.shape[2] == 1:
        return
    kind = "".join(character for character in reason if not character.isdigit())
    if (name, kind) not in _said:
        _said.add((name, kind))
        warnings.warn(f"{name}: attention in 16 bits, because {reason}", AttentionFallback, stacklevel=4)


def _in_8_bits(
    codes: Format, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scaling: float | None, kwargs: Any
) -> Tensor:
    out, _ = attention_8bit(
        query, key[:, :, : visible.keys], value[:, :, : visible.keys], scale=scaling,
        window=(visible.left, visible.right), softcap=kwargs.get("softcap") or 0.0, sinks=kwargs.get("s_aux"),
        key_range=visible.key_range, cu_seqlens_q=visible.cu_seqlens, cu_seqlens_k=visible.cu_seqlens,
        qk=codes, pv=codes,
    )  # fmt: skip
    return out


def _in_16_bits(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
    scaling: float | None, causal: bool, kwargs: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is not None or sinks is not None:
        causal = causal and mask is None and query.shape[2] > 1
        return plain(query, key, value, mask, causal, scaling, softcap, sinks), None
    kwargs = {name: given for name, given in kwargs.items() if name not in ("softcap", "s_aux")}
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] == 1 and groups > 1 and kwargs.get("position_bias") is None and _shared(mask):
        # The queries of a group become those of one head: keys and values are read once, and not copied for each.
        batch, heads, _, d = query.shape
        grouped = query.reshape(batch, heads // groups, groups, d)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        return out.reshape(batch, 1, heads, value.shape[3]), None
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
    )


def _shared(mask: Tensor | None) -> bool:
    """Whether all heads have one mask."""
    return mask is None or (mask.ndim == 4 and mask.shape[1] == 1)


def plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention in plain torch, a piece of the queries at a time: scores and softmax in float32.

    mask    bool (True is seen) or additive, broadcasts to [B, Hq, Sq, Skv]; with `causal` query i sees keys up to i
    softcap scores become ``softcap * tanh(score / softcap)``
    sinks   [Hq] scores that take their share of the weights and have no value
    """
    batch, heads, length, d = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    step = max(1, _PLAIN_ELEMENTS // max(1, batch * heads * keys))
    scale = d**-0.5 if scaling is None else scaling
    grouped = query.reshape(batch, kv_heads, groups, length, d)
    pieces = []
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        scores = (grouped[:, :, :, rows] @ key[:, :, None].transpose(-1, -2)).float().flatten(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = _masked(scores, mask, causal, rows)
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1, 1).expand(batch, -1, scores.shape[2], 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = weights.to(value.dtype).unflatten(1, (kv_heads, groups))
        pieces.append((weights @ value[:, :, None]).flatten(1, 2))
    return torch.cat(pieces, 2).transpose(1, 2)


def _masked(scores: Tensor, mask: Tensor | None, causal: bool, rows: slice) -> Tensor:
    lowest = torch.finfo(scores.dtype).min
    if causal:
        place = torch.arange(rows.start, rows.stop, device=scores.device)
        hidden = torch.arange(scores.shape[-1], device=scores.device) > place[:, None]
        return scores.masked_fill(hidden, lowest)
    if mask is None:
        return scores
    mask = mask[..., rows, : scores.shape[-1]] if mask.shape[-2] > 1 else mask[..., : scores.shape[-1]]
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
