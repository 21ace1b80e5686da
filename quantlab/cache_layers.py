"""Layers of the quantized KV cache, in transformers' terms: growing, static, and the ring of a sliding window.

`update` only makes place and returns a `Handle`; tokens are appended once attention has brought the mask, which says
where padding ends and a sequence begins. See `quantlab.cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from quantlab import masks
from quantlab.errors import UsageError
from quantlab.keys import Keys
from quantlab.linear import as_autocast
from quantlab.scheme import did_you_mean
from quantlab_kernels import attention_decode, kv_append
from quantlab_kernels.attention_decode.reference import near_positions
from quantlab_kernels.common.kv import FORMATS, KVFormat, PackedKV, dequantize_rows, quantize_rows
from quantlab_kernels.kv_append.reference import smooth

BLOCK = 256  # tokens that a growing layer allocates at a time
_REGULAR = "_quantlab_regular"  # of a single token's mask: by window and tokens, whether it hides left padding alone
FEW = 16  # queries up to which reading the packed tokens beats dequantizing them

# Format -> tokens at the start (attention sinks) and the newest that are read in 16 bits. They get most of the
# attention, so they cause most of the loss, of three mantissa bits as of four-bit codes. INT8 loses little without.
NEAR = {"fp8": (4, 64), "k8v4": (4, 64), "int4": (4, 64)}


@dataclass(frozen=True)
class KV:
    """What the cache holds.

    format   "fp8", "int8", "int4", "k8v4" (keys INT8, values INT4) or "16bit"
    first, newest
             so many tokens at the start of a sequence and at its end are read in 16 bits
    prefill  "exact": a prompt attends to its own 16-bit keys; "packed": to what the cache's codes will hold. The second
             is what a measurement of the format's loss wants
    """

    format: KVFormat
    first: int = 0
    newest: int = 0
    prefill: Literal["exact", "packed"] = "exact"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"unknown KV format {self.format!r}; {did_you_mean(str(self.format), FORMATS)}")
        if self.first < 0 or self.newest < 0:
            raise UsageError(f"first = {self.first}, newest = {self.newest}: needs numbers of tokens, 0 or more")
        if self.prefill not in ("exact", "packed"):
            raise UsageError(f"prefill = {self.prefill!r}; {did_you_mean(self.prefill, ['exact', 'packed'])}")

    @classmethod
    def of(cls, kv: KV | str) -> KV:
        """A setting as it is, or by the name of its format, with the tokens in 16 bits that it needs (`NEAR`)."""
        return kv if isinstance(kv, KV) else cls(kv, *NEAR.get(kv, (0, 0)))  # type: ignore[arg-type]


class Handle:
    """What `update` gives to attention in place of keys and of values. `shape` and `dtype` are those of the keys."""

    def __init__(self, layer: PackedLayer, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value
        self.dtype, self.device, self.ndim = key.dtype, key.device, 4

    @property
    def shape(self) -> torch.Size:
        batch, heads, _, d = self.key.shape
        return torch.Size((batch, heads, self.layer.get_mask_sizes(0)[0], d))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _refuse(name)

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__("[]")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _refuse(getattr(function, "__name__", str(function)))

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float | None, kwargs: dict[str, Any], training: bool = False
    ) -> Tensor | None:
        """Appends the new tokens. Returns out [B, Sq, Hq, D] of attention over the packed cache, None for a prompt, for
        masks that are more than left padding, and for gradients in training: those take `dense`, then."""
        if kwargs.get("position_bias") is not None:
            raise UsageError(
                "scores have a position bias, which attention over a quantized cache lacks; load without kv"
            )
        layer, queries = self.layer, query.shape[2]
        prompt = not layer.filled and queries > 1
        layer.begin(self.key, mask)
        given = query, self.key, self.value
        if prompt or (training and _has_gradient(*given)) or not layer.reads_packed(queries, mask):
            self.key, self.value = layer.dense(self.key, self.value, prompt)
            return None
        layer.append(self.key, self.value)
        out = self.over_packed(query, scaling, kwargs)
        if _has_gradient(*given) and not torch.compiler.is_compiling():
            return _WithoutGradient.apply(out, *given)
        return out

    def over_packed(self, query: Tensor, scaling: float | None, kwargs: dict[str, Any]) -> Tensor:
        """Attention over what the layer holds now: [B, Sq, Hq, D]."""
        layer = self.layer
        out, _ = attention_decode(
            query, layer.cache, layer.length, start=layer.start, window=layer.window or kwargs.get("sliding_window"),
            scale=scaling, softcap=kwargs.get("softcap") or 0.0, sinks=kwargs.get("s_aux"), longest=layer.longest,
        )  # fmt: skip
        return out

    def dense(self, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, Hkv, keys, D] for attention as usual, after `attend` gave None; the mask cut to them."""
        if mask is not None and mask.ndim == 4:
            mask = mask[..., : self.key.shape[2]]
        return self.key, self.value, mask


def _has_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _WithoutGradient(torch.autograd.Function):
    """Attention over packed tokens, of which gradients are asked in vain: most loops that forget `torch.no_grad()` ask
    for none."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *given: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise UsageError("attention over a quantized cache has no gradients outside of training; call model.train()")


def _refuse(name: str) -> NoReturn:
    raise UsageError(
        f"the model asks cached keys for {name!r}: it computes on them outside of attention, or its attention is "
        "not ours (attn_implementation must be quantlab, quantlab_int8 or quantlab_fp8); leave out kv"
    )


class PackedLayer(CacheLayerMixin):
    """What all layers have in common: the packed tokens, how many they are, and where padding ends.

    tokens   how many the host has counted: a static layer's graphs count on the device alone
    cache    `PackedKV` of B sequences         length  [B] int32, tokens of each sequence, on the device
    start    [B] int32, the first real token   filled  whether there are any tokens
    irregular  a mask hid more than left padding: attention goes over the dequantized tokens from then on
    """

    is_sliding = False
    is_croppable = False
    window: int | None = None
    few = FEW
    tokens: int
    handle: type[Handle] = Handle
    held: tuple[str, ...] = ("k", "v", "k_scale", "v_scale")  # tensors of the cache with a slot for every token
    beside: tuple[str, ...] = ("k_near", "v_near")  # other tensors of sequences
    heads: tuple[int, int]  # of keys, and the channels of each
    slots_at = 2  # dimension of the slots

    def __init__(self, kv: KV, keys: Keys | None = None) -> None:
        super().__init__()
        self.kv, self.channels = kv, keys
        self.filled = self.irregular = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, tokens, d = key_states.shape
        if batch == 0:
            raise UsageError("an empty batch: the quantized cache needs one sequence at least")
        if value_states.shape != key_states.shape:
            raise UsageError(
                f"keys {tuple(key_states.shape)} and values {tuple(value_states.shape)}: a quantized cache needs them "
                "alike, as in grouped-query attention; leave out kv"
            )
        if d % 2 and "int4" in FORMATS[self.kv.format]:
            raise UsageError(f"heads of {d} channels: kv={self.kv.format} needs an even number; take int8 or fp8")
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.heads = heads, d
        self.cache = PackedKV.empty(
            self.kv.format, batch, heads, self._slots(tokens), d, dtype=self.dtype, device=self.device,
            first=self.kv.first, newest=self._newest(), ring=self.window is not None,
        )  # fmt: skip
        if self.channels is not None:
            mean, scale = (x.to(self.device) for x in self.channels[:2])
            if mean.shape[1:] != (heads, d):
                raise UsageError(f"statistics of {tuple(mean.shape[1:])} heads and channels for keys of {(heads, d)}")
            self.cache = self.cache.with_keys(mean, scale)
        self.length = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.start = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def _slots(self, tokens: int) -> int:
        raise NotImplementedError

    def _newest(self) -> int:
        return self.kv.newest if self.window is None else min(self.kv.newest, self.window)

    @property
    def longest(self) -> int | None:
        """Upper bound of `length` known to the host."""
        return self.cache.capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """A handle, twice, in place of keys and values; the tokens are appended once attention has seen the mask."""
        key_states, value_states = as_autocast(key_states), as_autocast(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, _, d = key_states.shape
        if batch != self.batch_size:
            raise UsageError(f"a batch of {batch} for a cache of {self.batch_size} sequences; make a new one")
        if (heads, d) != self.heads:
            raise UsageError(
                f"keys of {heads} heads of {d} channels for a cache of {self.heads[0]} of {self.heads[1]}: it belongs "
                "to another model; make one by quantlab.cache.new_cache"
            )
        self._thaw()
        self._reserve(key_states.shape[2])
        handle = self.handle(self, key_states, value_states)
        return handle, handle

    def _reserve(self, tokens: int) -> None:
        raise NotImplementedError

    def _thaw(self) -> None:
        """What was written in inference mode may not be written outside of it: copies may."""
        if not self.is_initialized or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if self.length.is_inference():
            self._map_sequences(Tensor.clone)

    def begin(self, key: Tensor, mask: Tensor | None) -> None:
        """Learn from a mask where padding ends. A compiled graph learns that of a sequence's first call, and nothing of
        what else a mask hides (`cache.use` says so)."""
        queries = key.shape[2]
        if mask is None:
            return
        if torch.compiler.is_compiling():
            if not self.filled:
                self.start.copy_(masks.leading_padding(mask, queries))
        elif queries > 1:
            self._read(masks.visible_of(mask))
        elif not self.filled:
            self.irregular = bool(masks.leading_padding(mask, 1).any())  # where it ends later calls would have to say
        else:
            self.notice(mask)

    def notice(self, mask: Tensor | None) -> None:
        """Learn from the mask of a single token, which is counted and not appended yet, whether it hides more than left
        padding. Waits for the GPU once per mask, as transformers did when it made the mask."""
        if mask is None or mask.ndim != 4 or self.irregular or torch.compiler.is_compiling():
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        known, kind = vars(mask).setdefault(_REGULAR, {}), (self.window, self.tokens)  # alike in many layers
        if kind not in known:
            seen = masks.seen(mask)[:, :, 0]
            place = torch.arange(seen.shape[-1], device=seen.device) + self._first_of(seen.shape[-1])
            length, start = (x.to(seen.device)[:, None, None] for x in (self.length, self.start))
            expected = (place >= start) & (place <= length)
            if self.window is not None:
                expected &= place > length - self.window
            known[kind] = bool((seen == expected).all())
        self.irregular = not known[kind]

    def _first_of(self, keys: int) -> int:
        """The number of the first token that a mask over so many keys speaks of."""
        return 0

    def _read(self, visible: masks.Visible | None) -> None:
        """`begin` of several tokens outside of graphs."""
        bounds = None if visible is None else visible.key_range
        if visible is None or visible.cu_seqlens is not None or visible.right != 0:
            self.irregular = True
        elif bounds is not None:
            if not self.filled:
                self.start.copy_(bounds[:, 0])
            start = (self.start - self._first_of(visible.keys)).clamp(min=0)
            self.irregular |= bool(((bounds[:, 1] != visible.keys) | (bounds[:, 0] != start)).any())

    def reads_packed(self, queries: int, mask: Tensor | None) -> bool:
        """Whether attention of so many queries may go over the packed tokens."""
        if self.irregular or queries > (1 if self.window is not None else self.few):
            return False
        return queries == 1 or masks.visible_of(mask) is not None

    def append(self, key: Tensor, value: Tensor) -> None:
        """Quantize keys and values [B, Hkv, S, D] and write them behind the others."""
        self.length.add_(key.shape[2])
        kv_append(key, value, self.cache, self.length, start=self.start)
        self.filled = True

    def dense(self, key: Tensor, value: Tensor, prompt: bool) -> tuple[Tensor, Tensor]:
        """Append, and return all that these queries may see in 16 bits: what was there dequantized but for near tokens,
        these and what is new as they came (`KV.prefill`)."""
        new = (key, value) if self.kv.prefill == "exact" else self.round_trip(key, value)
        seen = new if prompt or not self.filled else self._behind_past(*new)
        self.append(key, value)
        return seen

    def _behind_past(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What was there, and new keys and values behind it."""
        begin, slots = self._past()
        past = self.dequantized(slots)
        k, v = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
        if self._reads_near:
            self._write_near(k, v, begin)
            behind = past[0].shape[2]
            k[:, :, behind], v[:, :, behind] = key[:, :, 0], value[:, :, 0]
        return k, v

    def _past(self) -> tuple[int, Any]:
        """The first token there that new ones see, and the slots of all of them."""
        raise NotImplementedError

    @property
    def _reads_near(self) -> bool:
        return self.kv.first + self.kv.newest > 0 and self.kv.prefill == "exact"

    def _write_near(self, k: Tensor, v: Tensor, begin: int) -> None:
        """Write near tokens as they came over k and v [B, Hkv, S, D] of the tokens from `begin` on. Near slots that
        hold none of these go where the next token belongs, which is to be written after: leaving them out would wait
        for the GPU."""
        c = self.cache
        if c.k_near is None or c.v_near is None:
            return
        place = near_positions(c, self.length, self.start) - begin
        place = torch.where(place >= 0, place, self.length[:, None] - begin).clamp(max=k.shape[2] - 1)
        place = place[:, None, :, None].expand_as(c.k_near)
        k.scatter_(2, place, c.k_near.to(k.dtype))
        v.scatter_(2, place, c.v_near.to(v.dtype))

    def round_trip(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they come back from the cache."""
        key_code, value_code = FORMATS[self.kv.format]
        codes = quantize_rows(smooth(key, self.cache.k_mean, self.cache.k_channel), key_code, self.dtype)
        values = quantize_rows(value.float(), value_code, self.dtype)
        return self._keys(*codes), dequantize_rows(*values, torch.float32).to(self.dtype)

    def _keys(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        k = dequantize_rows(codes, scale, torch.float32)
        if self.cache.k_channel is not None:
            k = k * self.cache.k_channel[:, :, None]
        if self.cache.k_mean is not None:
            k = k + self.cache.k_mean[:, :, None]
        return k.to(self.dtype)

    def dequantized(self, slots: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, slots, D] of a slice or of numbers of slots."""
        c = self.cache
        k, v = (_slots(x, slots) for x in (c.k, c.v))
        k_scale, v_scale = (None if x is None else _slots(x, slots) for x in (c.k_scale, c.v_scale))
        return self._keys(k, k_scale), dequantize_rows(v, v_scale, torch.float32).to(self.dtype)

    def reset(self) -> None:
        self._thaw()
        self.filled = self.irregular = False
        if self.is_initialized:
            self.length.zero_()
            self.start.zero_()

    def _refill_newest(self, old: int, tokens: int) -> None:
        """The newest in 16 bits are others after a crop: those that had left come back from the packed slots."""
        c = self.cache
        back = torch.arange(max(tokens - c.newest, 0), max(min(old - c.newest, tokens), 0), device=self.device)
        if back.numel() and c.k_near is not None and c.v_near is not None:
            k, v = self.dequantized(back)
            place = c.first + back % c.newest
            c.k_near[:, :, place], c.v_near[:, :, place] = k, v

    def _map_sequences(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what belongs to sequences, all tensors of the layer, by a change of their first dimension."""
        if not self.is_initialized:
            return
        names = (*self.held, *self.beside)
        changed: dict[str, Any] = {n: change(t) for n in names if (t := getattr(self.cache, n)) is not None}
        self.cache = replace(self.cache, **changed)
        self.length, self.start = change(self.length), change(self.start)
        self.batch_size = len(self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_sequences(lambda x: _rows(x, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            index = torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats)
            self._map_sequences(lambda x: _rows(x, index))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            index = torch.arange(self.batch_size, device=self.device)[indices]  # a mask or a list selects, too
            self._map_sequences(lambda x: _rows(x, index))

    def offload(self) -> None:
        raise UsageError("the quantized cache stays on its GPU; leave out offloading, or leave out kv")

    prefetch = offload


class DynamicPackedLayer(PackedLayer):
    """Grows by blocks of `BLOCK` tokens."""

    is_croppable = True

    def __init__(self, kv: KV, keys: Keys | None = None) -> None:
        super().__init__(kv, keys)
        self.tokens = self._appended = 0

    def _slots(self, tokens: int) -> int:
        return -(-max(tokens, 1) // BLOCK) * BLOCK

    @property
    def longest(self) -> int | None:
        return self._slots(self.tokens)  # the compiler makes a graph for each number: not one for each token

    def _reserve(self, tokens: int) -> None:
        self.tokens += tokens
        if self.tokens > self.cache.capacity:
            slots = self._slots(self.tokens)
            found = {n: t for n in self.held if (t := getattr(self.cache, n)) is not None}
            grown: dict[str, Any] = {n: _resized(t, slots, self.slots_at) for n, t in found.items()}
            self.cache = replace(self.cache, **grown)

    def _past(self) -> tuple[int, Any]:
        return 0, slice(0, self._appended)

    def append(self, key: Tensor, value: Tensor) -> None:
        super().append(key, value)
        self._appended = self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        super().reset()
        self.tokens, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens. A positive number is what should be left, as it once was."""
        kept = tokens_to_remove if tokens_to_remove > 0 else self.tokens + tokens_to_remove
        if not self.is_initialized or kept >= self.tokens:
            return
        if kept <= 0:
            return self.reset()
        self._thaw()
        old, self.tokens = self.tokens, kept
        self._appended = self.tokens
        self.length.sub_(old - self.tokens)
        if self.kv.newest:  # latents have none
            self._refill_newest(old, self.tokens)


class StaticPackedLayer(PackedLayer):
    """As long as it will ever be, at fixed addresses: compiled models and CUDA graphs read it."""

    is_compileable = True

    def __init__(self, kv: KV, max_cache_len: int, keys: Keys | None = None) -> None:
        super().__init__(kv, keys)
        self.max_cache_len = max_cache_len
        self.tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        _keep_addresses(self)

    def _slots(self, tokens: int) -> int:
        return self.max_cache_len

    def _reserve(self, tokens: int) -> None:
        """Refuse what does not fit, as far as the host knows: compiled steps count on the device alone."""
        if torch.compiler.is_compiling():
            return
        self.tokens += tokens
        if self.tokens > self.max_cache_len:
            raise UsageError(
                f"{self.tokens} tokens for a static cache of {self.max_cache_len}; give it more by max_cache_len"
            )

    def _behind_past(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens there are only the device knows: all slots, the mask hides the rest."""
        k, v = self.dequantized(slice(None))
        if self._reads_near:
            self._write_near(k, v, 0)
        place = self.length[0].long() + torch.arange(key.shape[2], device=self.device)
        place = place.clamp(max=self.max_cache_len - 1)  # compiled steps may go past the end, and are dropped
        # Codes in 16 bits are no copies: what is written there is what `append` will write, and never has a gradient.
        write = Tensor.index_copy if _has_gradient(key, value) else Tensor.index_copy_
        return write(k, 2, place, key.to(k.dtype)), write(v, 2, place, value.to(v.dtype))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        return self.length[0].clone() if self.is_initialized else 0  # what it was when asked: `append` adds in place

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        super().reset()
        self.tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        _reorder_in_place(self, beam_idx)


class WindowPackedLayer(PackedLayer):
    """The last tokens of a sliding window in a ring: dynamic and static caches have the same one."""

    is_sliding = True

    def __init__(self, kv: KV, sliding_window: int, keys: Keys | None = None, *, static: bool = False) -> None:
        super().__init__(kv, keys)
        self.is_compileable = static  # transformers compiles what it can, and a growing cache should not be
        self.window = self.capacity = self.max_cache_len = sliding_window
        self.tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        _keep_addresses(self)

    def _slots(self, tokens: int) -> int:
        return self.capacity

    def _reserve(self, tokens: int) -> None:
        self.tokens += tokens

    def dense(self, key: Tensor, value: Tensor, prompt: bool) -> tuple[Tensor, Tensor]:
        self._before = self.tokens - key.shape[2]
        return super().dense(key, value, prompt)

    def _past(self) -> tuple[int, Any]:
        begin = max(self._before - self.capacity + 1, 0)
        return begin, torch.arange(begin, self._before, device=self.device) % self.capacity

    def _first_of(self, keys: int) -> int:
        return self.tokens - keys

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.tokens, self.capacity - 1)
        return past + query_length, self.tokens - past

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        super().reset()
        self.tokens = 0
        if not self.is_compileable:  # growing caches may get another batch; static ones keep their addresses
            self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        _reorder_in_place(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        kept = tokens_to_remove if tokens_to_remove > 0 else self.tokens + tokens_to_remove
        if self.tokens > self.capacity:
            raise UsageError(
                "tokens of a quantized sliding window cannot be taken back: speculative decoding needs a model without "
                "windows, or no kv"
            )
        if kept <= 0:
            return self.reset()
        self._thaw()
        old, self.tokens = self.tokens, kept
        self.length.sub_(old - self.tokens)
        self._refill_newest(old, self.tokens)


def _slots(x: Tensor, slots: Any) -> Tensor:
    if isinstance(slots, slice):
        return x[:, :, slots]
    return _as_bytes(x)[:, :, slots].view(x.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return _as_bytes(x).index_select(0, index.to(x.device)).view(x.dtype)


def _as_bytes(x: Tensor) -> Tensor:
    """E4M3 as bytes: torch cannot index it everywhere."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _resized(x: Tensor, slots: int, at: int) -> Tensor:
    grown = x.new_zeros((*x.shape[:at], slots, *x.shape[at + 1 :]))
    _as_bytes(grown).narrow(at, 0, x.shape[at]).copy_(_as_bytes(x))
    return grown


def _all_tensors(layer: PackedLayer) -> list[Tensor]:
    held = [getattr(layer.cache, name) for name in (*layer.held, *layer.beside)]
    return [t for t in (*held, layer.length, layer.start) if t is not None]


def _keep_addresses(layer: PackedLayer) -> None:
    """Tell the compiler that these tensors stay where they are: CUDA graphs need it."""
    if not torch.compiler.is_compiling():
        numbers = [getattr(layer.cache, name, None) for name in ("k_mean", "k_channel")]
        for tensor in (*_all_tensors(layer), *(x for x in numbers if x is not None)):
            torch._dynamo.mark_static_address(tensor)


def _reorder_in_place(layer: PackedLayer, index: Tensor) -> None:
    if layer.is_initialized:
        layer._thaw()
        for tensor in _all_tensors(layer):
            tensor.copy_(_rows(tensor, index))
