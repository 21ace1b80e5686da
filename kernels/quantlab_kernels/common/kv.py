"""The packed KV cache: what `kv_append` writes and `attention_decode` reads.

A token of a KV head is one row of codes with its own scale, for keys and for values. What makes keys survive few bits
is done around the codes and is exact: softmax does not see `k_mean`, subtracted from every key, and `k_channel`, which
divides keys, multiplies queries. INT4 rows have a zero beside the scale: `value = scale * code + zero`.

Slots are dense, [B, Hkv, capacity, D] with a token's position as its slot (modulo the capacity in a ring), or pages,
[pages, Hkv, page size, D], that a block table deals out. Byte j of an INT4 row holds channels j (low) and j + D/2, so
that kernels multiply both halves without interleaving them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from quantlab_kernels.formats import E4M3, INT8

KVFormat = Literal["fp8", "int8", "int4", "k8v4", "16bit"]
Code = Literal["e4m3", "int8", "int4", "float"]

FORMATS: dict[str, tuple[Code, Code]] = {  # of keys, of values
    "fp8": ("e4m3", "e4m3"), "int8": ("int8", "int8"), "int4": ("int4", "int4"), "k8v4": ("int8", "int4"),
    "16bit": ("float", "float"),
}  # fmt: skip
LEVELS = 15  # of an INT4 code
SMALLEST = 2.0**-24  # scale of an INT4 row, the least float16


@dataclass(frozen=True)
class PackedKV:
    """Keys and values of one layer. S slots in each of N sequences or pages.

    k, v        [N, Hkv, S, D] float8_e4m3fn, int8 or (16bit) float;  INT4: [N, Hkv, S, D / 2] uint8
    k_scale, v_scale
                [N, Hkv, S] float32;  INT4: [N, Hkv, S, 2] float16, scale and zero;  16bit: None
    k_mean      [B or 1, Hkv, D] float32 or None: subtracted from keys before they are quantized
    k_channel   [B or 1, Hkv, D] float32 or None: keys are divided by it then, queries multiplied
    k_near, v_near
                [B, Hkv, first + newest, D] or None: the first tokens of a sequence and the newest once more, as they
                came. A position p (its sequence's first is `start`) is in slot p - start, or first + p % newest.
    first       how many tokens at the start are read from k_near, v_near;  newest  how many at the end
    ring        a token's slot is its position modulo S
    """

    format: KVFormat
    head_dim: int
    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_mean: Tensor | None = None
    k_channel: Tensor | None = None
    k_near: Tensor | None = None
    v_near: Tensor | None = None
    first: int = 0
    newest: int = 0
    ring: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"no KV format {self.format!r}; there are {', '.join(FORMATS)}")
        if self.first < 0 or self.newest < 0 or (self.k_near is None) != (self.first + self.newest == 0):
            raise ValueError(f"first = {self.first} and newest = {self.newest} tokens need k_near and v_near for them")

    @staticmethod
    def empty(
        format: KVFormat, rows: int, heads: int, slots: int, head_dim: int, *, dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None, first: int = 0, newest: int = 0, ring: bool = False,
    ) -> PackedKV:  # fmt: skip
        """Zeroed slots: `rows` sequences of `slots` tokens, or pages. `dtype` of 16bit codes and of the near tokens.

        Raises ValueError for an unknown format and for INT4 with an odd head_dim.
        """
        if format not in FORMATS:
            raise ValueError(f"no KV format {format!r}; there are {', '.join(FORMATS)}")
        parts = [_empty(code, (rows, heads, slots), head_dim, dtype, device) for code in FORMATS[format]]
        (k, k_scale), (v, v_scale) = parts
        near: list[Tensor | None] = [None, None]
        if first + newest > 0:
            shape = (rows, heads, first + newest, head_dim)
            near = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
        return PackedKV(
            format, head_dim, k, v, k_scale, v_scale, k_near=near[0], v_near=near[1], first=first, newest=newest,
            ring=ring,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Slots of a sequence, or of a page."""
        return self.k.shape[2]

    @property
    def bytes_per_token(self) -> float:
        """Of all heads, keys and values, scales included; the near tokens and per-channel numbers are not."""
        tensors = [t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors) / (self.k.shape[0] * self.capacity)

    def with_keys(self, k_mean: Tensor | None, k_channel: Tensor | None) -> PackedKV:
        """The same slots with other per-channel numbers."""
        return replace(self, k_mean=k_mean, k_channel=k_channel)


def _empty(
    code: Code, shape: tuple[int, int, int], head_dim: int, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[Tensor, Tensor | None]:
    if code == "int4":
        if head_dim % 2:
            raise ValueError(f"INT4 rows hold two channels in a byte, head_dim = {head_dim} is odd")
        zeros = torch.zeros(*shape, head_dim // 2, dtype=torch.uint8, device=device)
        return zeros, torch.zeros(*shape, 2, dtype=torch.float16, device=device)
    if code == "float":
        return torch.zeros(*shape, head_dim, dtype=dtype, device=device), None
    dtype = torch.float8_e4m3fn if code == "e4m3" else torch.int8
    return torch.zeros(*shape, head_dim, dtype=dtype, device=device), torch.zeros(*shape, device=device)


def code_of(codes: Tensor) -> Code:
    """What kind of codes a tensor of the cache holds."""
    kinds: dict[torch.dtype, Code] = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.uint8: "int4"}
    return kinds.get(codes.dtype, "float")


def quantize_rows(x: Tensor, code: Code, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of rows x [..., D] float32; `dtype` of 16-bit codes.

    8 bits: scale = amax / limit (1 where amax is 0). INT4: zero = the least element and scale = range / 15, both
    rounded to float16 before codes are taken, so that codes make up for that rounding.
    """
    if code == "float":
        return x.to(dtype), None
    if code == "int4":
        zero = x.amin(-1).to(torch.float16)
        scale = ((x.amax(-1) - zero.float()) / LEVELS).clamp(min=SMALLEST).to(torch.float16)
        codes = ((x - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, LEVELS)
        codes = codes.nan_to_num(0.0).to(torch.uint8)
        low, high = codes.chunk(2, -1)
        return low | high << 4, torch.stack((scale, zero), -1)
    number = E4M3 if code == "e4m3" else INT8
    amax = x.abs().amax(-1)
    scale = torch.where(amax > 0, (amax / number.max).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return number.cast(x / scale[..., None]), scale


def dequantize_rows(codes: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inverse of `quantize_rows`: [..., D] in `dtype`."""
    code = code_of(codes)
    if scale is None:
        return codes.to(dtype)
    if code == "int4":
        wide = torch.cat((codes & 15, codes >> 4), -1).to(dtype)
        return wide * scale[..., :1].to(dtype) + scale[..., 1:].to(dtype)
    return codes.to(dtype) * scale.to(dtype)[..., None]
