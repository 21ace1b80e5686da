"""What the INT4 GEMM rooms share: the layouts of a weight, the problem as a value, the checks, the definition.

A weight of codes [N, K] in groups of 128 along K comes in one of two layouts, both int32:

    words  [N, K / 8]  as `packing.pack_int4` and compressed-tensors' files have it; holds every code, -8 too
    tiles  [ceil(N / 64), K / 128, ...]  what Hopper's kernels read: 64 rows by 128 of K are 4096 bytes, in which each
           of 128 threads finds the 64 codes that it hands to the MMA as register operands

Tiles are made for one width of the activations, since the MMA asks its threads for other elements then; their shape
tells which, so that no op takes the other's.

[..., 1024]    8-bit activations. Sign and magnitude: E4M3 with a zero exponent is ``magnitude * 2**-9``, exactly, so
               masks alone make four codes of a word into four E4M3 numbers, and a rotation by 4 brings the other four
               there: three integer operations for eight weights (a lookup table takes ten). No code may be -8.
[..., 2, 512]  16-bit activations. ``code + 8`` in the low bits of a 16-bit number whose exponent makes their unit 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.gemm import OUT_DTYPES
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.packing import unpack_int4

GROUP = 128  # of K that share a weight scale
ROWS = 64  # of a tile
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPED_TOKENS = 64
_CHUNK = 1 << 24  # codes that are rearranged at a time


@dataclass(frozen=True)
class Int4Problem:
    """``out[M, N] = x[M, K] @ w[N, K].T`` with an INT4 weight: the key of dispatch and of tuning tables.

    With experts E the M rows are sorted by expert, and each meets the weight of its own.

    x          dtype of the activations: float8_e4m3fn, bfloat16, float16
    scale      dtype of the weight's scales
    grouped    E4M3 activations have a scale for every 128 of K, not one for each token
    tiles      the weight is in tiles, not in words
    """

    m: int
    n: int
    k: int
    x: torch.dtype = torch.float8_e4m3fn
    out_dtype: torch.dtype = torch.bfloat16
    bias: torch.dtype | None = None
    scale: torch.dtype = torch.bfloat16
    grouped: bool = False
    tiles: bool = True
    sm: int = 90
    experts: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Least traffic: codes, scales, activations, the result; each moved once."""
        each = self.n * self.k // 2 + self.n * self.k // GROUP * self.scale.itemsize
        weight = each * max(1, min(self.experts, self.m))
        tokens = self.m * self.k * self.x.itemsize
        scales = 0 if self.x.itemsize > 1 else 4 * self.m * (self.k // GROUP if self.grouped else 1)
        return weight + tokens + scales + self.m * self.n * self.out_dtype.itemsize

    def __str__(self) -> str:
        x, out = (str(dtype).removeprefix("torch.") for dtype in (self.x, self.out_dtype))
        form = f"{'grouped ' if self.grouped else ''}{x}, {'tiles' if self.tiles else 'words'}"
        experts = f" of {self.experts} experts" if self.experts else ""
        bias = " + bias" if self.bias else ""
        return f"M={self.m}{experts} N={self.n} K={self.k} {form} -> {out}{bias} on sm_{self.sm}"


def scales_by_group(tokens: int) -> bool:
    """Whether a layer quantizes the E4M3 activations of so many tokens with a scale for each group of 128 along K; of
    more of them each token has one scale. Experts count the tokens that each has on average.

    Scales of groups lose less, and up to 64 tokens, where the weight's bytes are waited for, they cost little. Beyond,
    each sum of 128 products has its own product of two scales, a fifth to a third more time (see `gemm_int4_fp8`). One
    scale for each token is what compressed-tensors' W4AFP8 says, so other engines see many tokens so too.
    """
    return tokens <= GROUPED_TOKENS


# ---- layouts ----


def prepare_int4(words: Tensor, *, activation_bits: int) -> Tensor:
    """The layout that the kernels of the device which holds `words` are fastest with: tiles on Hopper where no code
    stands against it, else the words themselves. Synchronizes; to be called when a weight arrives, not in a forward."""
    hopper = words.is_cuda and gpu_of(words).sm == 90
    if not hopper or words.shape[1] % (GROUP // 8) or (activation_bits == 8 and has_minus_eight(words)):
        return words
    return repack_int4(words, activation_bits=activation_bits)


def has_minus_eight(words: Tensor) -> bool:
    """Whether a code is -8 (nibble 0): ours never are, symmetric checkpoints of others may be."""
    filled = words | (words >> 1)
    filled = filled | (filled >> 2)
    return bool(((filled & 0x11111111) != 0x11111111).any())


def repack_int4(words: Tensor, *, activation_bits: int = 8) -> Tensor:
    """Words [N, K / 8] -> tiles for 8-bit or 16-bit activations; rows are padded with zeros to a multiple of 64.

    Raises ValueError for K that is not a multiple of 128, and for a code of -8 in tiles for 8-bit activations: those
    keep a sign and a magnitude up to 7. The ops take such a weight as words, more slowly.
    """
    _check_words(words)
    _check_bits(activation_bits)
    if activation_bits == 8 and has_minus_eight(words):
        raise ValueError(
            "repack_int4: the weight holds codes of -8, tiles for 8-bit activations hold -7 to 7; leave it in words"
        )
    n, k = words.shape[0], words.shape[1] * 8
    blocks = -(-n // ROWS)
    shape = (blocks, k // GROUP, 1024) if activation_bits == 8 else (blocks, k // GROUP, 2, 512)
    tiles = words.new_empty(shape)
    step = max(1, _CHUNK // (ROWS * k))
    for first in range(0, blocks, step):
        codes = unpack_int4(words[first * ROWS : (first + step) * ROWS], k)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % ROWS))
        part = tiles[first : first + step]
        part.copy_((_bytes_of if activation_bits == 8 else _halves_of)(codes.to(torch.int32)).reshape(part.shape))
    return tiles


def unrepack_int4(tiles: Tensor, n: int) -> Tensor:
    """Tiles -> words [N, K / 8]. Inverse of `repack_int4`; raises ValueError for what is not in tiles."""
    bits = activation_bits_of(tiles)
    if bits is None or not 0 <= tiles.shape[0] * ROWS - n < ROWS:
        raise ValueError(f"unrepack_int4: got {tiles.dtype} {tuple(tiles.shape)}, needs tiles of a weight of {n} rows")
    step = max(1, _CHUNK // (ROWS * GROUP * tiles.shape[1]))
    parts = [
        _words_of((_from_bytes if bits == 8 else _from_halves)(tiles[first : first + step]))
        for first in range(0, tiles.shape[0], step)
    ]
    return torch.cat(parts)[:n]


def activation_bits_of(weight: Tensor) -> int | None:
    """8 or 16 for tiles made for such activations, None for anything else."""
    if weight.dtype == torch.int32 and weight.dim() == 3 and weight.shape[2] == 1024:
        return 8
    if weight.dtype == torch.int32 and weight.dim() == 4 and tuple(weight.shape[2:]) == (2, 512):
        return 16
    return None


# Row 64 R + 16 w + 8 b + r and column 128 g + 32 s + 16 h + 4 q + i belong to thread 32 w + 4 r + q of tile (R, g), to
# register 2 h + b of step s of the MMA and to its byte i. Word 2 (s % 2) + h of the thread's vector s / 2 holds both b.
_BYTE_AXES = (-1, 4, 2, 8), (-1, 2, 2, 2, 4, 4)  # rows: R w b r; columns: g, s / 2, s % 2, h, q, i
_BYTE_ORDER = (0, 4, 5, 1, 3, 8, 6, 7, 2, 9)  # R g s/2 w r q s%2 h b i
_SIGN = tuple(8 * i + 7 for i in range(4)) + tuple(8 * i + 3 for i in range(4))  # bit of the sign, by 4 b + i
_MAGNITUDE = tuple(8 * i for i in range(4)) + tuple((8 * i + 28) % 32 for i in range(4))

# For 16-bit activations steps are 16 long, and so are registers' halves: column 128 g + 16 s + 8 h + 2 q + e. Word
# s % 4 of vector s / 4 holds the whole step: register c = 2 h + b at bits 4 c, half e 16 above.
_HALF_AXES = (-1, 4, 2, 8), (-1, 2, 4, 2, 4, 2)  # rows: R w b r; columns: g, s / 4, s % 4, h, q, e
_HALF_ORDER = (0, 4, 5, 1, 3, 8, 6, 7, 2, 9)  # R g s/4 w r q s%4 h b e
_NIBBLE = tuple(4 * (2 * h + b) + 16 * e for h in (0, 1) for b in (0, 1) for e in (0, 1))


def _bytes_of(codes: Tensor) -> Tensor:
    """Codes [64 R, K] int32 -> [R, g, 2, w, r, q, 2 s + h] words of signs and magnitudes."""
    ordered = _split(codes, _BYTE_AXES).permute(_BYTE_ORDER).flatten(8)
    shift = ordered.new_tensor
    return (((ordered < 0).to(torch.int32) << shift(_SIGN)) | (ordered.abs() << shift(_MAGNITUDE))).sum(
        dim=8, dtype=torch.int32
    )


def _from_bytes(tiles: Tensor) -> Tensor:
    """Inverse of `_bytes_of`."""
    words = tiles.reshape(*tiles.shape[:2], 2, 4, 8, 4, 2, 2, 1)
    shift = words.new_tensor
    magnitude = (words >> shift(_MAGNITUDE)) & 7
    codes = torch.where(((words >> shift(_SIGN)) & 1) == 1, -magnitude, magnitude)
    return _join(codes.unflatten(8, (2, 4)), _BYTE_ORDER)


def _halves_of(codes: Tensor) -> Tensor:
    """Codes [64 R, K] int32 -> [R, g, 2, w, r, q, s] words of nibbles ``code + 8``."""
    ordered = (_split(codes, _HALF_AXES).permute(_HALF_ORDER) + 8).flatten(7)
    return (ordered << ordered.new_tensor(_NIBBLE)).sum(dim=7, dtype=torch.int32)


def _from_halves(tiles: Tensor) -> Tensor:
    """Inverse of `_halves_of`."""
    words = tiles.reshape(*tiles.shape[:2], 2, 4, 8, 4, 4, 1)
    codes = ((words >> words.new_tensor(_NIBBLE)) & 15) - 8
    return _join(codes.unflatten(7, (2, 2, 2)), _HALF_ORDER)


def _split(codes: Tensor, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    return codes.unflatten(1, axes[1]).unflatten(0, axes[0])


def _join(ordered: Tensor, order: tuple[int, ...]) -> Tensor:
    """Undo permutation and split: [64 R, K]."""
    back = [order.index(axis) for axis in range(len(order))]
    return ordered.permute(back).flatten(4).flatten(0, 3)


def _words_of(codes: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4, device=codes.device, dtype=torch.int32)
    return ((codes + 8).unflatten(1, (-1, 8)) << shifts).sum(dim=2, dtype=torch.int32)


def _check_words(words: Tensor) -> None:
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] % (GROUP // 8):
        raise ValueError(
            f"repack_int4: got {words.dtype} {tuple(words.shape)}, needs int32 [N, K / 8] with K a multiple of {GROUP}"
        )


def _check_bits(activation_bits: int) -> None:
    if activation_bits not in (8, 16):
        raise ValueError(f"repack_int4: activation_bits = {activation_bits}, needs 8 or 16")


# ---- ops ----


def check_weight(op: str, bits: int, x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> None:
    """Refuse operands that do not fit. Shapes may be symbolic. Raises RuntimeError naming what was given and needed."""
    torch._check(x.dim() == 2, lambda: f"{op}: activations {tuple(x.shape)}, needs [M, K]")
    k, n = x.shape[1], b_scale.shape[0]
    torch._check(k % GROUP == 0, lambda: f"{op}: K = {k}, needs a multiple of {GROUP}; pad weight and activations")
    words = b.dtype == torch.int32 and b.dim() == 2
    given = activation_bits_of(b)
    torch._check(
        words or given is not None,
        lambda: f"{op}: b is {b.dtype} {tuple(b.shape)}, needs int32 words [N, K/8] or tiles of `repack_int4`",
    )
    torch._check(words or given == bits, lambda: f"{op}: b is in tiles for {given}-bit activations, needs {bits}")
    rows, groups = (b.shape[0], b.shape[1] * 8 // GROUP) if words else (b.shape[0], b.shape[1])
    needed = n if words else (n + ROWS - 1) // ROWS
    torch._check(
        b_scale.dtype in SCALE_DTYPES and b_scale.dim() == 2 and rows == needed and groups == k // GROUP,
        lambda: (
            f"{op}: b {tuple(b.shape)} does not fit activations {tuple(x.shape)} and b_scale {tuple(b_scale.shape)}"
        ),
    )
    torch._check(
        b_scale.shape[1] == k // GROUP,
        lambda: f"{op}: b_scale is {b_scale.dtype} {tuple(b_scale.shape)}, needs [{n}, {k // GROUP}]",
    )
    if bias is not None:
        torch._check(
            bias.dtype.is_floating_point and tuple(bias.shape) == (n,),
            lambda: f"{op}: bias is {bias.dtype} {tuple(bias.shape)}, needs floats of shape {(n,)}",
        )


def check_out_dtype(op: str, out_dtype: torch.dtype) -> None:
    torch._check(out_dtype in OUT_DTYPES, lambda: f"{op}: out_dtype {out_dtype}, needs one of {OUT_DTYPES}")


def decode(b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weight [N, K] that words or tiles and scales stand for; exact in float64 and float32."""
    n, groups = b_scale.shape
    words = b if b.dim() == 2 else unrepack_int4(b, n)
    codes = unpack_int4(words, groups * GROUP).to(dtype)
    return (codes.unflatten(1, (groups, GROUP)) * b_scale.to(dtype)[:, :, None]).flatten(1)
