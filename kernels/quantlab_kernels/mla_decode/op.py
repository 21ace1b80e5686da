"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.kv import Code, code_of
from quantlab_kernels.common.latent import FORMATS, PackedLatent
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.kv_append.op import check_places
from quantlab_kernels.mla_decode import eager

BACKENDS = Backends("mla_decode", ("sm90_rows", "sm90", "triton", "eager"), last_resort="eager")
_QUERIES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """What a backend decides on. longest: tokens that a sequence has at most; page: slots of a page, 0 is dense.

    rank, rope  channels of a latent, and of the part of a key that carries the position
    """

    batch: int
    heads: int
    sq: int
    rank: int
    rope: int
    longest: int
    code: Code
    dtype: torch.dtype = torch.bfloat16
    kept: torch.dtype = torch.bfloat16  # of the cache's 16-bit part
    page: int = 0
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: `longest` tokens read once, queries read and outputs written."""
        width = {"e4m3": 8, "int8": 8, "int4": 4, "float": 16}[self.code]
        token = self.rank * width // 8 + 2 * self.rope + (0 if self.code == "float" else 4)
        rows = self.batch * self.sq * self.heads
        return self.batch * self.longest * token + rows * (2 * self.rank + self.rope) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.heads * self.sq * (2 * self.rank + self.rope) * self.longest


def mla_decode(
    q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor, *, scale: float,
    start: Tensor | None = None, block_table: Tensor | None = None, longest: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``softmax(scale * (q_latent c^T + q_rope r^T)) c`` over the tokens (c, r) of a packed cache of latents.

    q_latent     [B, Sq, H, L] bfloat16, float16 or float32, any strides: queries times the keys' half of the projection
                 that expands latents
    q_rope       [B, Sq, H, R] of the same dtype: the part of the queries that carries the position
    length       [B] int32, on the device: tokens of each sequence. Query i stands at ``length - Sq + i`` and sees
                 no token after it. At most the capacity counts.
    scale        the model's factor of the scores, ``(nope + rope) ** -0.5`` in most; L does not tell it
    start        [B] int32: first token that is seen (left padding), 0 by default
    block_table  [B, pages] int32: the pages of each sequence in order; the cache is dense without it
    longest      upper bound of `length` known to the host; with it the work is divided better. Wrong is only slow.

    Returns out [B, Sq, H, L] in q's dtype, for the values' half of the projection, and lse [B, H, Sq] float32, log of
    the sum of exponentials of the scores that are seen. A query that sees nothing gets 0 and -inf. What lies in slots
    that no query sees does not matter, NaN included. Never waits for the GPU. Raises RuntimeError for operands that do
    not fit.
    """
    slots = cache.capacity * (1 if block_table is None else block_table.shape[1])
    return _OP(
        q_latent, q_rope, cache.latent, cache.rope, cache.scale, length, start, block_table, scale,
        slots if longest is None else min(longest, slots),
    )  # fmt: skip


def check_latents(op: str, rank: int, rope: int, latent: Tensor, rotary: Tensor, scale: Tensor | None) -> None:
    """Refuse tensors that are no cache of latents of `rank` and `rope` channels."""
    code = code_of(latent)
    width = rank // 2 if code == "int4" else rank
    require(
        latent.dim() == 3 and latent.shape[2] == width and latent.stride()[1:] == (width, 1),
        lambda: (
            f"{op}: the cache's latent is {latent.dtype} {tuple(latent.shape)}, "
            f"needs [N, slots, {width}] in rows without gaps"
        ),
    )
    require(
        rotary.dim() == 3
        and tuple(rotary.shape) == (*latent.shape[:2], rope)
        and rotary.stride()[1:] == (rope, 1)
        and rotary.dtype in _QUERIES,
        lambda: (
            f"{op}: the cache's rope is {rotary.dtype} {tuple(rotary.shape)}, needs floats {(*latent.shape[:2], rope)}"
        ),
    )
    require(
        scale is None
        if code == "float"
        else scale is not None and scale.dtype == torch.float32 and scale.shape == latent.shape[:2],
        lambda: (
            f"{op}: the cache's scale is {scale if scale is None else (scale.dtype, tuple(scale.shape))}, needs "
            f"{None if code == 'float' else (torch.float32, tuple(latent.shape[:2]))}"
        ),
    )


def _check(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, scales: Tensor | None, length: Tensor,
    start: Tensor | None, table: Tensor | None,
) -> None:  # fmt: skip
    require(
        q_latent.dim() == 4 and q_rope.dim() == 4 and q_latent.dtype in _QUERIES and q_rope.dtype == q_latent.dtype
        and q_latent.shape[:3] == q_rope.shape[:3],
        lambda: (
            f"mla_decode: q_latent {q_latent.dtype} {tuple(q_latent.shape)}, q_rope {q_rope.dtype} "
            f"{tuple(q_rope.shape)}; needs floats of one dtype, [B, Sq, H, L] and [B, Sq, H, R]"
        ),
    )  # fmt: skip
    batch = q_latent.shape[0]
    check_latents("mla_decode", q_latent.shape[3], q_rope.shape[3], latent, rope, scales)
    check_places("mla_decode", batch, length=length, start=start)
    require(
        table is not None or latent.shape[0] == batch,
        lambda: f"mla_decode: {batch} sequences for a cache of {latent.shape[0]}; a paged cache needs a block_table",
    )
    require(
        table is None or (table.dtype == torch.int32 and table.dim() == 2 and table.shape[0] == batch),
        lambda: f"mla_decode: the block_table needs int32 [{batch}, pages]",
    )


def _empty(q_latent: Tensor) -> tuple[Tensor, Tensor]:
    batch, sq, heads, rank = q_latent.shape
    return q_latent.new_empty((batch, sq, heads, rank)), q_latent.new_empty((batch, heads, sq), dtype=torch.float32)


def _fake(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, scales: Tensor | None, length: Tensor,
    start: Tensor | None, table: Tensor | None, scale: float, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q_latent, q_rope, latent, rope, scales, length, start, table)
    return _empty(q_latent)


def _packed(latent: Tensor, rope: Tensor, scales: Tensor | None) -> PackedLatent:
    name = next(name for name, code in FORMATS.items() if code == code_of(latent))
    return PackedLatent(name, latent, rope, scales)  # type: ignore[arg-type]


def _problem(q_latent: Tensor, cache: PackedLatent, table: Tensor | None, longest: int, sm: int) -> Problem:
    batch, sq, heads, rank = q_latent.shape
    return Problem(
        batch, heads, sq, rank, cache.rope.shape[2], longest, code_of(cache.latent), q_latent.dtype, cache.rope.dtype,
        0 if table is None else cache.capacity, sm,
    )  # fmt: skip


def _cpu(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, scales: Tensor | None, length: Tensor,
    start: Tensor | None, table: Tensor | None, scale: float, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q_latent, q_rope, latent, rope, scales, length, start, table)
    cache = _packed(latent, rope, scales)
    out, lse = _empty(q_latent)
    problem = _problem(q_latent, cache, table, longest, 0)
    eager.launch(problem, q_latent, q_rope, cache, length, start, table, scale, out, lse)
    return out, lse


def _cuda(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, scales: Tensor | None, length: Tensor,
    start: Tensor | None, table: Tensor | None, scale: float, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q_latent, q_rope, latent, rope, scales, length, start, table)
    out, lse = _empty(q_latent)
    if out.numel() == 0 or longest == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    longest = (longest + 255) // 256 * 256  # a cache that grows by tokens does not make a problem of each
    cache = _packed(latent, rope, scales)
    problem = _problem(q_latent, cache, table, longest, gpu_of(q_latent).sm)
    with device_of(q_latent):
        BACKENDS.select(problem).launch(
            problem, q_latent, q_rope, cache, length, start, table, scale, out, lse
        )  # fmt: skip
    return out, lse


_OP = define(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor latent, Tensor rope, Tensor? scales, Tensor length,"
    " Tensor? start, Tensor? block_table, float scale, int longest) -> (Tensor, Tensor)",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
