"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.kv import Code, code_of
from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.kv_append.op import check_places
from quantlab_kernels.kv_append.reference import rows_of
from quantlab_kernels.mla_append import reference
from quantlab_kernels.mla_decode.op import check_latents

BACKENDS = Backends("mla_append", ("triton", "eager"), last_resort="eager")
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """tokens of each of `batch` sequences, rank + rope channels; more: there is a norm, a rotation or a page table."""

    batch: int
    tokens: int
    rank: int
    rope: int
    code: Code
    dtype: torch.dtype = torch.bfloat16
    sm: int = 90
    more: bool = False
    heads: int = 0  # whose queries are turned too, in a decoding step

    @property
    def bytes(self) -> int:
        """Least traffic: rows read once, codes, scale and position part written once."""
        width = {"e4m3": 8, "int8": 8, "int4": 4, "float": 8 * self.dtype.itemsize}[self.code]
        row = (self.rank + 2 * self.rope) * self.dtype.itemsize + self.rank * width // 8 + 4
        return self.batch * self.tokens * row


def mla_append(
    latent: Tensor, rope: Tensor, cache: PackedLatent, length: Tensor, *, norm: Tensor | None = None,
    eps: float = 1e-6, cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = False,
    slots: Tensor | None = None,
) -> None:  # fmt: skip
    """Normalize and quantize latents, turn the position part, and write both into the cache.

    latent       [B, S, L] bfloat16, float16 or float32, any strides, as is rope: both are views of one projection
    rope         [B, S, R] of the same dtype
    length       [B] int32 on their device: tokens of each sequence, these included; token i is at ``length - S + i``
    norm         [L] float: weights of an RMSNorm of the latents with `eps`; without it they are normalized already
    cos, sin     [B or 1, S, R] float of the tokens' positions; without them the position part is turned already
    interleaved  pairs of channels to turn lie side by side; in the cache they are R/2 apart
    slots        [B, S] int64: ``page * page size + place`` of each token, for a paged cache; -1 writes nothing

    What has no slot, a position below 0 or beyond a dense cache's capacity, is not written. Raises RuntimeError for
    operands that do not fit together.
    """
    _OP(
        latent, rope, cache.latent, cache.rope, cache.scale, length, norm, cos, sin, slots, eps, interleaved
    )  # fmt: skip


def mla_step(
    query: Tensor, latent: Tensor, rope: Tensor, cache: PackedLatent, length: Tensor, *, cos: Tensor, sin: Tensor,
    norm: Tensor | None = None, eps: float = 1e-6, interleaved: bool = False, kept_interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """What a decoding step does before attention: `mla_append` of one token, its queries turned, the length advanced.

    query        [B, 1, H, R] of latent's dtype, any strides: the part of the queries that carries the position
    latent, rope, norm, eps  as in `mla_append`, S = 1
    length       [B] int32: tokens of each sequence without this one, counted up by 1; it is written at the old length
    cos, sin     [B or 1, 1, R / 2] float, any strides: one angle for a pair
    interleaved, kept_interleaved  pairs of channels lie side by side in rope and query, and in the cache and the
                 result; else R/2 apart

    Returns the turned queries [B, 1, H, R]. Raises RuntimeError for operands that do not fit together.
    """
    return _STEP(
        query, latent, rope, cache.latent, cache.rope, cache.scale, length, norm, cos, sin, eps, interleaved,
        kept_interleaved,
    )  # fmt: skip


def mla_turn(
    query: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, kept_interleaved: bool = False
) -> None:
    """Turn queries [B, S, H, R] and keys [B, S, R] by their positions where they are, of a dtype and any strides.

    cos, sin [B or 1, S, R / 2] and the order of channels as in `mla_step`. Raises RuntimeError for operands that do not
    fit together.
    """
    _TURN(query, rope, cos, sin, interleaved, kept_interleaved)


def _check(
    latent: Tensor, rope: Tensor, codes: Tensor, kept: Tensor, scale: Tensor | None, length: Tensor,
    norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, slots: Tensor | None, eps: float, interleaved: bool,
) -> None:  # fmt: skip
    require(
        latent.dim() == 3 and rope.dim() == 3 and latent.shape[:2] == rope.shape[:2] and latent.dtype == rope.dtype
        and latent.dtype in _INPUTS,
        lambda: (
            f"mla_append: latent {latent.dtype} {tuple(latent.shape)}, rope {rope.dtype} {tuple(rope.shape)}; needs "
            "floats of one dtype, [B, S, L] and [B, S, R]"
        ),
    )  # fmt: skip
    batch, tokens, rank = latent.shape
    turning = rope.shape[2]
    check_latents("mla_append", rank, turning, codes, kept, scale)
    check_places("mla_append", batch, length=length)
    require(
        norm is None or (tuple(norm.shape) == (rank,) and norm.dtype in _INPUTS and norm.is_contiguous()),
        lambda: f"mla_append: norm needs {rank} floats without gaps",
    )
    require((cos is None) == (sin is None), lambda: "mla_append: cos and sin come together")
    _check_angles("cos", cos, batch, tokens, turning)
    _check_angles("sin", sin, batch, tokens, turning)
    require(
        slots is not None or codes.shape[0] == batch,
        lambda: f"mla_append: {batch} sequences for a cache of {codes.shape[0]}; a paged cache needs slots",
    )
    require(
        slots is None or (slots.dtype == torch.int64 and tuple(slots.shape) == (batch, tokens)),
        lambda: f"mla_append: slots need int64 {(batch, tokens)}",
    )


def _check_angles(name: str, x: Tensor | None, batch: int, tokens: int, turning: int) -> None:
    require(
        x is None or (x.dim() == 3 and x.shape[0] in (1, batch) and tuple(x.shape[1:]) == (tokens, turning)
                      and x.dtype in _INPUTS and x.stride(2) == 1 and turning % 2 == 0),
        lambda: f"mla_append: {name} needs floats [{batch} or 1, {tokens}, {turning}], an even number of channels",
    )  # fmt: skip


def _fake(*args: object) -> None:
    _check(*args)  # type: ignore[arg-type]


def _cpu(
    latent: Tensor, rope: Tensor, codes: Tensor, kept: Tensor, scale: Tensor | None, length: Tensor,
    norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, slots: Tensor | None, eps: float, interleaved: bool,
) -> None:  # fmt: skip
    _check(latent, rope, codes, kept, scale, length, norm, cos, sin, slots, eps, interleaved)
    _, row, slot = rows_of(latent.shape[1], length, slots, codes.shape[1], False)
    latent = reference.normalized(latent, norm, eps)
    reference.write(codes, kept, scale, latent, reference.turned(rope, cos, sin, interleaved), row, slot)


def _cuda(
    latent: Tensor, rope: Tensor, codes: Tensor, kept: Tensor, scale: Tensor | None, length: Tensor,
    norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, slots: Tensor | None, eps: float, interleaved: bool,
) -> None:  # fmt: skip
    arguments = latent, rope, codes, kept, scale, length, norm, cos, sin, slots, eps, interleaved
    _check(*arguments)
    if latent.numel() == 0:
        return
    batch, tokens, rank = latent.shape
    more = norm is not None or cos is not None or slots is not None
    problem = Problem(batch, tokens, rank, rope.shape[2], code_of(codes), latent.dtype, gpu_of(latent).sm, more)
    with device_of(latent):
        BACKENDS.select(problem).launch(problem, *arguments)


_OP = define(
    "mla_append(Tensor latent, Tensor rope, Tensor(a!) codes, Tensor(b!) kept, Tensor(c!)? scale, Tensor length,"
    " Tensor? norm, Tensor? cos, Tensor? sin, Tensor? slots, float eps, bool interleaved) -> ()",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip


def _check_step(
    query: Tensor, latent: Tensor, rope: Tensor, codes: Tensor, kept: Tensor, scale: Tensor | None, length: Tensor,
    norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float, interleaved: bool, kept_interleaved: bool,
) -> None:  # fmt: skip
    _check(latent, rope, codes, kept, scale, length, norm, None, None, None, eps, interleaved)
    batch, tokens, turning = rope.shape
    require(
        tokens == 1 and query.dim() == 4 and query.dtype == latent.dtype and query.shape[:2] == (batch, 1)
        and query.shape[3] == turning,
        lambda: (
            f"mla_step: {tokens} tokens, query {query.dtype} {tuple(query.shape)}; needs one token, {latent.dtype} "
            f"{(batch, 1, 'H', turning)}"
        ),
    )  # fmt: skip
    _check_pairs("mla_step", batch, 1, turning, cos, sin)


def _check_pairs(op: str, batch: int, tokens: int, turning: int, cos: Tensor, sin: Tensor) -> None:
    require(
        turning % 2 == 0 and all(
            x.dim() == 3 and x.shape[0] in (1, batch) and tuple(x.shape[1:]) == (tokens, turning // 2)
            and x.dtype in _INPUTS for x in (cos, sin)
        ),
        lambda: (
            f"{op}: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; need floats [{batch} or 1, {tokens}, "
            f"{turning // 2}]"
        ),
    )  # fmt: skip


def _step_fake(query: Tensor, *rest: Any) -> Tensor:
    _check_step(query, *rest)
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _step_cpu(
    query: Tensor, latent: Tensor, rope: Tensor, codes: Tensor, kept: Tensor, scale: Tensor | None, length: Tensor,
    norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float, interleaved: bool, kept_interleaved: bool,
) -> Tensor:  # fmt: skip
    _check_step(
        query, latent, rope, codes, kept, scale, length, norm, cos, sin, eps, interleaved, kept_interleaved
    )  # fmt: skip
    turn = functools.partial(reference.turned_pairs, interleaved=interleaved, kept_interleaved=kept_interleaved)
    length.add_(1)
    _, row, slot = rows_of(1, length, None, codes.shape[1], False)
    reference.write(codes, kept, scale, reference.normalized(latent, norm, eps), turn(rope, cos, sin), row, slot)
    return turn(query, cos[:, :, None], sin[:, :, None]).to(query.dtype)


def _step_cuda(
    query: Tensor, latent: Tensor, rope: Tensor, codes: Tensor, kept: Tensor, scale: Tensor | None, length: Tensor,
    norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float, interleaved: bool, kept_interleaved: bool,
) -> Tensor:  # fmt: skip
    arguments = query, latent, rope, codes, kept, scale, length, norm, cos, sin, eps, interleaved, kept_interleaved
    out = _step_fake(*arguments)
    if latent.numel() == 0:
        return out
    batch, _, rank = latent.shape
    problem = Problem(
        batch, 1, rank, rope.shape[2], code_of(codes), latent.dtype, gpu_of(latent).sm, True, query.shape[2]
    )
    with device_of(latent):
        BACKENDS.select(problem).launch_step(problem, *arguments, out)
    return out


_STEP = define(
    "mla_step(Tensor query, Tensor latent, Tensor rope, Tensor(a!) codes, Tensor(b!) kept, Tensor(c!)? scale,"
    " Tensor(d!) length, Tensor? norm, Tensor cos, Tensor sin, float eps, bool interleaved, bool kept_interleaved)"
    " -> Tensor",
    fake=_step_fake, cpu=_step_cpu, cuda=_step_cuda,
)  # fmt: skip


def _check_turn(
    query: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, kept_interleaved: bool
) -> None:  # fmt: skip
    require(
        rope.dim() == 3 and query.dim() == 4 and query.dtype == rope.dtype and rope.dtype in _INPUTS
        and query.shape[:2] == rope.shape[:2] and query.shape[3] == rope.shape[2],
        lambda: (
            f"mla_turn: query {query.dtype} {tuple(query.shape)}, rope {rope.dtype} {tuple(rope.shape)}; needs floats "
            "of one dtype, [B, S, H, R] and [B, S, R]"
        ),
    )  # fmt: skip
    batch, tokens, turning = rope.shape
    _check_pairs("mla_turn", batch, tokens, turning, cos, sin)


def _turn_cpu(
    query: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, kept_interleaved: bool
) -> None:  # fmt: skip
    _check_turn(query, rope, cos, sin, interleaved, kept_interleaved)
    rope.copy_(reference.turned_pairs(rope, cos, sin, interleaved, kept_interleaved))
    query.copy_(reference.turned_pairs(query, cos[:, :, None], sin[:, :, None], interleaved, kept_interleaved))


def _turn_cuda(
    query: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, kept_interleaved: bool
) -> None:  # fmt: skip
    arguments = query, rope, cos, sin, interleaved, kept_interleaved
    _check_turn(*arguments)
    if rope.numel() == 0:
        return
    batch, tokens, heads, turning = query.shape
    problem = Problem(batch, tokens, 16, turning, "float", query.dtype, gpu_of(query).sm, True, heads)
    with device_of(query):
        BACKENDS.select(problem).launch_turn(problem, *arguments)


_TURN = define(
    "mla_turn(Tensor(a!) query, Tensor(b!) rope, Tensor cos, Tensor sin, bool interleaved, bool kept_interleaved)"
    " -> ()",
    fake=_check_turn, cpu=_turn_cpu, cuda=_turn_cuda,
)  # fmt: skip
