"""The packed cache of multi-head latent attention: what `mla_append` writes and `mla_decode` reads.

A token is one row for all heads: its latent (the compressed keys and values, DeepSeek-V2, arXiv 2405.04434) as codes
with one scale, and the part of the key that carries its position in 16 bits, whose outliers few bits do not hold. One
scale per token is outside of both products of a head, so that codes multiply as they are.

INT4 has no zero: ``value = scale * (2 code - 15)``, 16 levels symmetric about 0, and the scale is the best of a few
clips of the row. Latents should be turned first (`quantlab.latent`), which makes rows Gaussian; such a row then loses
no more than one with a scale per 64 channels. Byte j of an INT4 row holds channels j (low) and j + L/2.

Slots are dense, [B, capacity], with a token's position as its slot, or pages, [pages, page size], that a block table
deals out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantlab_kernels.common.kv import Code, code_of
from quantlab_kernels.formats import E4M3, INT8

LatentFormat = Literal["fp8", "int8", "int4", "16bit"]

FORMATS: dict[str, Code] = {"fp8": "e4m3", "int8": "int8", "int4": "int4", "16bit": "float"}
LIMIT = 15  # largest INT4 level, in units of the scale
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # shares of a row's largest magnitude that INT4 tries to represent
SMALLEST = 2.0**-60  # scale of a row; weights of a token, relative to its scale, stay within float32


@dataclass(frozen=True)
class PackedLatent:
    """The tokens of one layer. S slots in each of N sequences or pages.

    latent  [N, S, L] float8_e4m3fn, int8 or (16bit) float;  INT4: [N, S, L / 2] uint8
    rope    [N, S, R] float: the channels of the shared key that are turned by the position
    scale   [N, S] float32;  16bit: None
    """

    format: LatentFormat
    latent: Tensor
    rope: Tensor
    scale: Tensor | None = None

    @staticmethod
    def empty(
        format: LatentFormat, rows: int, slots: int, rank: int, rope: int, *, dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> PackedLatent:  # fmt: skip
        """Zeroed slots: `rows` sequences of `slots` tokens, or pages. `dtype` of what stays in 16 bits.

        Raises ValueError for an unknown format and for INT4 with an odd rank.
        """
        if format not in FORMATS:
            raise ValueError(f"no format {format!r} of latents; there are {', '.join(FORMATS)}")
        code = FORMATS[format]
        if code == "int4" and rank % 2:
            raise ValueError(f"INT4 rows hold two channels in a byte, {rank} latent channels are odd")
        kind = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8, "float": dtype}[code]
        width = rank // 2 if code == "int4" else rank
        return PackedLatent(
            format,
            torch.zeros(rows, slots, width, dtype=kind, device=device),
            torch.zeros(rows, slots, rope, dtype=dtype, device=device),
            None if code == "float" else torch.zeros(rows, slots, device=device),
        )

    @property
    def capacity(self) -> int:
        """Slots of a sequence, or of a page."""
        return self.latent.shape[1]

    @property
    def rank(self) -> int:
        """L, channels of a latent."""
        return self.latent.shape[2] * (2 if self.format == "int4" else 1)

    @property
    def bytes_per_token(self) -> int:
        """Codes, scale and the part that carries the position."""
        held = [self.latent, self.rope, *([] if self.scale is None else [self.scale])]
        return sum(t.numel() * t.element_size() for t in held) // (self.latent.shape[0] * self.capacity)


def quantize_latent(x: Tensor, code: Code, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Codes and scales [...] of rows x [..., L] float32; `dtype` of 16-bit codes.

    8 bits: scale = amax / limit, 1 where amax is 0. INT4: of `CLIPS` the one with the least squared error; the first
    where two are alike.
    """
    if code == "float":
        return x.to(dtype), None
    amax = x.abs().amax(-1)
    if code == "int4":
        scales = torch.stack([(amax * (clip / LIMIT)).clamp(min=SMALLEST) for clip in CLIPS])
        errors = torch.stack([(_levels(x, s) * s[..., None] - x).square().sum(-1) for s in scales])
        scale = scales.gather(0, errors.argmin(0, keepdim=True))[0]
        codes = ((_levels(x, scale) + LIMIT) / 2).to(torch.uint8)
        low, high = codes.chunk(2, -1)
        return low | high << 4, scale
    number = E4M3 if code == "e4m3" else INT8
    scale = torch.where(amax > 0, (amax / number.max).clamp(min=SMALLEST), 1.0)
    return number.cast(x / scale[..., None]), scale


def _levels(x: Tensor, scale: Tensor) -> Tensor:
    """The nearest odd numbers from -15 to 15 to x / scale; those of NaN are what a GPU makes of it."""
    halves = ((x / scale[..., None] + LIMIT) * 0.5).nan_to_num(0.0)
    return 2 * halves.round().clamp(0, LIMIT) - LIMIT


def dequantize_latent(codes: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inverse of `quantize_latent`: [..., L] in `dtype`."""
    if scale is None:
        return codes.to(dtype)
    if code_of(codes) == "int4":
        wide = 2 * torch.cat((codes & 15, codes >> 4), -1).to(dtype) - LIMIT
        return wide * scale[..., None].to(dtype)
    return codes.to(dtype) * scale.to(dtype)[..., None]


TILE = 128  # channels of a scale in the exchange layout


def to_exchange(cache: PackedLatent) -> Tensor:
    """Rows of an `fp8` cache as FlashMLA keeps them: uint8 [N, S, L + 4 L / 128 + 2 R], lossless.

    E4M3 codes, a float32 scale for each 128 channels (here the token's, repeated), bfloat16 position part; 656 bytes
    for 512 + 64 channels. Raises ValueError for other formats.
    """
    if cache.format != "fp8" or cache.scale is None or cache.rank % TILE:
        raise ValueError(f"{cache.format} latents of {cache.rank} channels; the exchange layout is of fp8, {TILE} each")
    scales = cache.scale[..., None].repeat(1, 1, cache.rank // TILE)
    parts = cache.latent, scales, cache.rope.to(torch.bfloat16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


def from_exchange(rows: Tensor, rank: int) -> PackedLatent:
    """Inverse of `to_exchange`. Rows whose scales differ are quantized again, with the largest of them as the one."""
    codes, scales, rope = rows.split([rank, 4 * rank // TILE, rows.shape[-1] - rank - 4 * rank // TILE], -1)
    tiles = scales.contiguous().view(torch.float32)
    scale = tiles.amax(-1)
    latent = codes.contiguous().view(torch.float8_e4m3fn)
    ratio = (tiles / scale[..., None]).repeat_interleave(TILE, -1)
    latent = E4M3.cast(latent.to(torch.float32) * ratio)
    return PackedLatent("fp8", latent, rope.contiguous().view(torch.bfloat16), scale)
