"""Tiles of codes -> tiles of E4M3, for products with so many tokens that decoding once and for all pays."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def expand(tiles: Tensor) -> Tensor:
    """Tiles int32 [R, G, 1024] of `repack_int4` -> int32 [R, G, 2048]: 64 rows of 128 bytes, E4M3 ``code * 2**-9``.

    16-byte chunk c of row r lies at chunk ``c ^ r % 8``, the 128-byte swizzle that the MMA reads shared memory with.
    """
    out = tiles.new_empty((*tiles.shape[:2], 2048))
    _expand_kernel[(tiles.shape[0] * tiles.shape[1],)](tiles, out, num_warps=4)
    return out


@triton.jit
def _expand_kernel(tiles_ptr, out_ptr):
    """One tile. Row 16 w + 8 b + r, bytes 32 s + 16 h + 4 q: `common/int4.py` says in which word they are."""
    tile = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, 2048)
    row, chunk, q = at // 32, at // 4 % 8, at % 4
    r, w, upper = row % 8, row // 16, row // 8 % 2
    step_half = chunk ^ r  # 2 s + h
    word = tl.load(tiles_ptr + tile * 1024 + step_half // 4 * 512 + (w * 32 + r * 4 + q) * 4 + step_half % 4)
    word = tl.where(upper == 1, (word << 4) | ((word >> 28) & 15), word)
    tl.store(out_ptr + tile * 2048 + at, word & -0x78787879)
