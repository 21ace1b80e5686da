"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.attention_decode import eager
from quantlab_kernels.attention_decode.reference import Attributes
from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.kv import FORMATS, Code, PackedKV, code_of
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.kv_append.op import check_cache, check_channels, check_places

BACKENDS = Backends("attention_decode", ("sm90", "triton", "eager"), last_resort="eager")
_QUERIES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """What a backend decides on. longest: tokens that a sequence has at most; page: slots of a page or of a ring."""

    batch: int
    heads_q: int
    heads_kv: int
    sq: int
    d: int
    longest: int
    key: Code
    value: Code
    dtype: torch.dtype = torch.bfloat16
    page: int = 0
    near: int = 0
    window: int = -1
    ring: bool = False
    softcap: bool = False
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: the codes and scales of `longest` tokens, or of the window, read once."""
        width = {"e4m3": 8, "int8": 8, "int4": 4, "float": 16}
        tokens = self.longest if self.window < 0 else min(self.longest, self.window)
        token = sum(self.d * width[code] // 8 + (4 if code != "float" else 0) for code in (self.key, self.value))
        return self.batch * self.heads_kv * tokens * token

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads_q * self.sq * self.d * self.longest


def attention_decode(
    q: Tensor, cache: PackedKV, length: Tensor, *, start: Tensor | None = None, block_table: Tensor | None = None,
    window: int | None = None, scale: float | None = None, softcap: float = 0.0, sinks: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``softmax(scale * q k^T) v`` over the tokens of a packed cache, for a few queries of each sequence.

    q            [B, Hq, Sq, D] bfloat16, float16 or float32, any strides; Hq a multiple of the cache's heads
    length       [B] int32, on the device: tokens of each sequence. Query i stands at ``length - Sq + i`` and sees
                 no token after it. At most the capacity counts, unless the cache is a ring.
    start        [B] int32: first token that is seen (left padding), 0 by default
    block_table  [B, pages] int32: the pages of each sequence in order; the cache is dense without it
    window       a query sees so many tokens at most, its own included
    scale        1 / sqrt(D) by default;  softcap  above 0: scores become ``softcap * tanh(score / softcap)``
    sinks        [Hq] float: a further score per head that takes its share of the weights and has no value
    longest      upper bound of `length` known to the host; with it the work is divided better. Wrong is only slow.

    Returns out [B, Sq, Hq, D] in q's dtype and lse [B, Hq, Sq] float32, log of the sum of exponentials of the scores
    that are seen, the sink not among them. A query that sees nothing gets 0 and -inf. What lies in slots that no query
    sees does not matter, NaN included. Never waits for the GPU. Raises RuntimeError for operands that do not fit.
    """
    default = cache.head_dim**-0.5
    slots = cache.capacity * (1 if block_table is None else block_table.shape[1])
    return _OP(
        q, cache.k, cache.k_scale, cache.v, cache.v_scale, cache.k_near, cache.v_near, cache.k_mean, cache.k_channel,
        length, start, block_table, sinks, cache.first, cache.ring, -1 if window is None else window,
        default if scale is None else scale, softcap, slots if longest is None else min(longest, slots),
    )  # fmt: skip


def _check(
    q: Tensor, k: Tensor, k_scale: Tensor | None, v: Tensor, v_scale: Tensor | None, k_near: Tensor | None,
    v_near: Tensor | None, k_mean: Tensor | None, k_channel: Tensor | None, length: Tensor, start: Tensor | None,
    table: Tensor | None, sinks: Tensor | None, window: int,
) -> None:  # fmt: skip
    require(
        q.dim() == 4 and q.dtype in _QUERIES and k.dim() == 4 and q.shape[1] % k.shape[1] == 0,
        lambda: (
            f"attention_decode: q {q.dtype} {tuple(q.shape)} and keys {tuple(k.shape)}; needs [B, Hq, Sq, D] floats, "
            "Hq a multiple of the cache's heads"
        ),
    )
    (batch, heads_q, _, d), heads = q.shape, k.shape[1]
    check_cache("attention_decode", d, heads, k, k_scale, v, v_scale)
    check_channels("attention_decode", batch, heads, d, k_mean=k_mean, k_channel=k_channel)
    check_places("attention_decode", batch, length=length, start=start)
    require(
        table is not None or k.shape[0] == batch,
        lambda: f"attention_decode: {batch} sequences for a cache of {k.shape[0]}; a paged cache needs a block_table",
    )
    require(
        table is None or (table.dtype == torch.int32 and table.dim() == 2 and table.shape[0] == batch),
        lambda: f"attention_decode: the block_table needs int32 [{batch}, pages]",
    )
    require(
        sinks is None or (tuple(sinks.shape) == (heads_q,) and sinks.dtype.is_floating_point),
        lambda: f"attention_decode: sinks need a float of each of {heads_q} heads",
    )
    require(window == -1 or window >= 1, lambda: f"attention_decode: window = {window}, needs at least 1 token")
    require(
        (k_near is None) == (v_near is None)
        and (k_near is None or v_near is None
             or (k_near.shape == v_near.shape and (*k_near.shape[:2], k_near.shape[3]) == (batch, heads, d))),
        lambda: f"attention_decode: k_near and v_near need [{batch}, {heads}, first + newest, {d}]",
    )  # fmt: skip


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, sq, d = q.shape
    return q.new_empty((batch, sq, heads, d)), q.new_empty((batch, heads, sq), dtype=torch.float32)


def _fake(
    q: Tensor, k: Tensor, k_scale: Tensor | None, v: Tensor, v_scale: Tensor | None, k_near: Tensor | None,
    v_near: Tensor | None, k_mean: Tensor | None, k_channel: Tensor | None, length: Tensor, start: Tensor | None,
    table: Tensor | None, sinks: Tensor | None, first: int, ring: bool, window: int, scale: float, softcap: float,
    longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, k_scale, v, v_scale, k_near, v_near, k_mean, k_channel, length, start, table, sinks, window)
    return _empty(q)


def _packed(
    q: Tensor, k: Tensor, k_scale: Tensor | None, v: Tensor, v_scale: Tensor | None, k_near: Tensor | None,
    v_near: Tensor | None, k_mean: Tensor | None, k_channel: Tensor | None, first: int, ring: bool,
) -> PackedKV:  # fmt: skip
    name = next(name for name, codes in FORMATS.items() if codes == (code_of(k), code_of(v)))
    newest = 0 if k_near is None else k_near.shape[2] - first
    return PackedKV(
        name, q.shape[3], k, v, k_scale, v_scale, k_mean, k_channel, k_near, v_near, first, newest, ring  # type: ignore[arg-type]
    )  # fmt: skip


def _cpu(
    q: Tensor, k: Tensor, k_scale: Tensor | None, v: Tensor, v_scale: Tensor | None, k_near: Tensor | None,
    v_near: Tensor | None, k_mean: Tensor | None, k_channel: Tensor | None, length: Tensor, start: Tensor | None,
    table: Tensor | None, sinks: Tensor | None, first: int, ring: bool, window: int, scale: float, softcap: float,
    longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, k_scale, v, v_scale, k_near, v_near, k_mean, k_channel, length, start, table, sinks, window)
    cache = _packed(q, k, k_scale, v, v_scale, k_near, v_near, k_mean, k_channel, first, ring)
    out, lse = _empty(q)
    problem = _problem(q, cache, table, window, softcap, longest, 0)
    eager.launch(problem, q, cache, length, start, table, Attributes(scale, window, softcap), sinks, out, lse)
    return out, lse


def _problem(
    q: Tensor, cache: PackedKV, table: Tensor | None, window: int, softcap: float, longest: int, sm: int
) -> Problem:
    batch, heads, sq, d = q.shape
    page = cache.capacity if cache.ring or table is not None else 0
    return Problem(
        batch, heads, cache.k.shape[1], sq, d, longest, code_of(cache.k), code_of(cache.v), q.dtype,
        page, cache.first + cache.newest, window, cache.ring, softcap > 0, sm,
    )  # fmt: skip


def _cuda(
    q: Tensor, k: Tensor, k_scale: Tensor | None, v: Tensor, v_scale: Tensor | None, k_near: Tensor | None,
    v_near: Tensor | None, k_mean: Tensor | None, k_channel: Tensor | None, length: Tensor, start: Tensor | None,
    table: Tensor | None, sinks: Tensor | None, first: int, ring: bool, window: int, scale: float, softcap: float,
    longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, k_scale, v, v_scale, k_near, v_near, k_mean, k_channel, length, start, table, sinks, window)
    out, lse = _empty(q)
    if out.numel() == 0 or longest == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    cache = _packed(q, k, k_scale, v, v_scale, k_near, v_near, k_mean, k_channel, first, ring)
    longest = (longest + 255) // 256 * 256  # a cache that grows by tokens does not make a problem of each
    problem = _problem(q, cache, table, window, softcap, longest, gpu_of(q).sm)
    with device_of(q):
        BACKENDS.select(problem).launch(
            problem, q, cache, length, start, table, Attributes(scale, window, softcap), sinks, out, lse
        )
    return out, lse


_OP = define(
    "attention_decode(Tensor q, Tensor k, Tensor? k_scale, Tensor v, Tensor? v_scale, Tensor? k_near, Tensor? v_near,"
    " Tensor? k_mean, Tensor? k_channel, Tensor length, Tensor? start, Tensor? block_table, Tensor? sinks, int first,"
    " bool ring, int window, float scale, float softcap, int longest) -> (Tensor, Tensor)",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
