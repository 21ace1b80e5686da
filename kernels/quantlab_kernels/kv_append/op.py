"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.kv import Code, PackedKV, code_of
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.kv_append import reference

BACKENDS = Backends("kv_append", ("triton", "eager"), last_resort="eager")
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """tokens of each of `batch` sequences; key and value: kinds of codes."""

    batch: int
    heads: int
    tokens: int
    d: int
    key: Code
    value: Code
    dtype: torch.dtype = torch.bfloat16
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: keys and values read once, codes and scales written once."""
        width = {"e4m3": 8, "int8": 8, "int4": 4, "float": 8 * self.dtype.itemsize}
        rows = self.batch * self.heads * self.tokens
        written = sum(self.d * width[code] // 8 + 4 for code in (self.key, self.value))
        return rows * (2 * self.d * self.dtype.itemsize + written)


def kv_append(
    k: Tensor, v: Tensor, cache: PackedKV, length: Tensor, *, start: Tensor | None = None, slots: Tensor | None = None
) -> None:
    """Quantize the rows of k and v and write them into the cache.

    k, v    [B, Hkv, S, D] bfloat16, float16 or float32, any strides; k after its rotation
    length  [B] int32 on their device: tokens of each sequence, these included. Token i stands at ``length - S + i``.
    start   [B] int32: position of a sequence's first token (left padding); matters to ``cache.first`` only
    slots   [B, S] int64: ``page * page size + place`` of each token, for a paged cache; -1 writes nothing

    What has no slot, a position below 0 or beyond a dense cache's capacity, is not written. Of a chunk longer than a
    ring its end is. Raises RuntimeError for operands that do not fit together.
    """
    _OP(
        k, v, cache.k, cache.k_scale, cache.v, cache.v_scale, cache.k_near, cache.v_near, cache.k_mean,
        cache.k_channel, length, start, slots, cache.first, cache.ring,
    )  # fmt: skip


def _check_codes(op: str, name: str, d: int, heads: int, codes: Tensor, scale: Tensor | None) -> None:
    code = code_of(codes)
    width = d // 2 if code == "int4" else d
    require(
        codes.dim() == 4 and codes.shape[1] == heads and codes.shape[3] == width and codes.stride(3) == 1,
        lambda: f"{op}: the cache's {name} is {codes.dtype} {tuple(codes.shape)}, needs [N, {heads}, slots, {width}]",
    )
    wanted = None if code == "float" else (*codes.shape[:3], 2) if code == "int4" else tuple(codes.shape[:3])
    dtype = torch.float16 if code == "int4" else torch.float32
    require(
        wanted is None if scale is None else tuple(scale.shape) == wanted and scale.dtype == dtype,
        lambda: (
            f"{op}: the cache's {name}_scale is {scale if scale is None else (scale.dtype, tuple(scale.shape))}, needs "
            f"{wanted if wanted is None else (dtype, wanted)}"
        ),
    )


def _check_channel(op: str, name: str, batch: int, heads: int, d: int, tensor: Tensor) -> None:
    require(
        tensor.dtype == torch.float32
        and tensor.dim() == 3
        and tensor.shape[0] in (1, batch)
        and tuple(tensor.shape[1:]) == (heads, d),
        lambda: f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, needs float32 [{batch} or 1, {heads}, {d}]",
    )


def _check_place(op: str, name: str, batch: int, tensor: Tensor) -> None:
    require(
        tensor.dtype == torch.int32 and tuple(tensor.shape) == (batch,),
        lambda: f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, needs int32 [{batch}]",
    )


def check_cache(
    op: str, d: int, heads: int, k: Tensor, k_scale: Tensor | None, v: Tensor, v_scale: Tensor | None
) -> None:
    """Refuse codes and scales that do not belong together."""
    _check_codes(op, "k", d, heads, k, k_scale)
    _check_codes(op, "v", d, heads, v, v_scale)
    require(
        k.shape[:3] == v.shape[:3], lambda: f"{op}: the cache has {tuple(k.shape)} keys and {tuple(v.shape)} values"
    )


def check_channels(op: str, batch: int, heads: int, d: int, **tensors: Tensor | None) -> None:
    """Refuse per-channel numbers that are not [B or 1, Hkv, D] float32."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_channel(op, name, batch, heads, d, tensor)


def check_places(op: str, batch: int, **tensors: Tensor | None) -> None:
    """Refuse lengths and starts that are not [B] int32."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_place(op, name, batch, tensor)


def _check(
    k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor | None, v_codes: Tensor, v_scale: Tensor | None,
    k_near: Tensor | None, v_near: Tensor | None, k_mean: Tensor | None, k_channel: Tensor | None, length: Tensor,
    start: Tensor | None, slots: Tensor | None, first: int, ring: bool,
) -> None:  # fmt: skip
    require(
        k.dim() == 4 and k.shape == v.shape and k.dtype == v.dtype and k.dtype in _INPUTS,
        lambda: f"kv_append: k {k.dtype} {tuple(k.shape)}, v {v.dtype} {tuple(v.shape)}; needs [B, Hkv, S, D] floats",
    )
    batch, heads, tokens, d = k.shape
    check_cache("kv_append", d, heads, k_codes, k_scale, v_codes, v_scale)
    check_channels("kv_append", batch, heads, d, k_mean=k_mean, k_channel=k_channel)
    check_places("kv_append", batch, length=length, start=start)
    require(
        slots is not None or k_codes.shape[0] == batch,
        lambda: f"kv_append: {batch} sequences for a cache of {k_codes.shape[0]}; a paged cache needs slots",
    )
    require(
        slots is None or (slots.dtype == torch.int64 and tuple(slots.shape) == (batch, tokens) and not ring),
        lambda: f"kv_append: slots need int64 {(batch, tokens)} and no ring",
    )
    require(
        (k_near is None) == (v_near is None)
        and (k_near is None or v_near is None
             or (k_near.shape == v_near.shape and (*k_near.shape[:2], k_near.shape[3]) == (batch, heads, d)
                 and k_near.dtype == v_near.dtype)),
        lambda: f"kv_append: k_near and v_near need [{batch}, {heads}, first + newest, {d}]",
    )  # fmt: skip


def _fake(*args: object) -> None:
    _check(*args)  # type: ignore[arg-type]


def _cpu(
    k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor | None, v_codes: Tensor, v_scale: Tensor | None,
    k_near: Tensor | None, v_near: Tensor | None, k_mean: Tensor | None, k_channel: Tensor | None, length: Tensor,
    start: Tensor | None, slots: Tensor | None, first: int, ring: bool,
) -> None:  # fmt: skip
    _check(
        k, v, k_codes, k_scale, v_codes, v_scale, k_near, v_near, k_mean, k_channel, length, start, slots, first, ring
    )
    position, row, slot = reference.rows_of(k.shape[2], length, slots, k_codes.shape[2], ring)
    reference.write(k_codes, k_scale, reference.smooth(k, k_mean, k_channel), row, slot)
    reference.write(v_codes, v_scale, v.to(torch.float32), row, slot)
    if k_near is not None and v_near is not None:
        start = torch.zeros_like(length) if start is None else start
        reference.write_near(k_near, k, position, start, length, first)
        reference.write_near(v_near, v, position, start, length, first)


def _cuda(
    k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor | None, v_codes: Tensor, v_scale: Tensor | None,
    k_near: Tensor | None, v_near: Tensor | None, k_mean: Tensor | None, k_channel: Tensor | None, length: Tensor,
    start: Tensor | None, slots: Tensor | None, first: int, ring: bool,
) -> None:  # fmt: skip
    arguments = (
        k, v, k_codes, k_scale, v_codes, v_scale, k_near, v_near, k_mean, k_channel, length, start, slots, first, ring
    )  # fmt: skip
    _check(*arguments)
    if k.numel() == 0:
        return
    batch, heads, tokens, d = k.shape
    problem = Problem(batch, heads, tokens, d, code_of(k_codes), code_of(v_codes), k.dtype, gpu_of(k).sm)
    with device_of(k):
        BACKENDS.select(problem).launch(problem, *arguments)


_OP = define(
    "kv_append(Tensor k, Tensor v, Tensor(a!) k_codes, Tensor(b!)? k_scale, Tensor(c!) v_codes, Tensor(d!)? v_scale,"
    " Tensor(e!)? k_near, Tensor(f!)? v_near, Tensor? k_mean, Tensor? k_channel, Tensor length, Tensor? start,"
    " Tensor? slots, int first, bool ring) -> ()",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
