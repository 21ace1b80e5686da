"""How a call is divided on Hopper: rows (heads times queries) of a CTA, and parts of each sequence's tokens."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from quantlab_kernels.common.kv import Code

if TYPE_CHECKING:
    from quantlab_kernels.mla_decode.op import Problem

TILE = 64  # tokens
MOST_PARTS = 128
START = 4  # tiles whose time a CTA takes to start and end
SHORT, SHORTEST = 256, 128  # tokens that are worth a CTA, and that are where most processors are idle

# Microseconds that a CTA takes to start and end, and for each tile of tokens, by its rows: 16 and 32 in `sm90`, 64 in
# `sm90_rows` (INT8: `sm90`). Fitted to the times of 101 shapes of 20 to 256 heads on an H200, 512 latent channels; 64
# rows of E4M3 and INT4, which have become quicker, to ten.
COSTS: dict[Code, dict[int, tuple[float, float]]] = {
    "float": {16: (4.7, 1.21), 32: (5.7, 1.99), 64: (5.8, 1.81)},
    "e4m3": {16: (5.3, 0.86), 32: (7.0, 1.39), 64: (9.0, 1.85)},
    "int4": {16: (6.0, 0.88), 32: (7.9, 1.55), 64: (9.1, 1.80)},
    "int8": {16: (5.2, 1.08), 32: (7.5, 1.63), 64: (11.2, 3.27)},
}
MERGE, MERGE_ROWS = 2.0, 1 / 512  # microseconds of the second kernel, and for each row of the call
PROCESSORS = 132  # of the GPU that was measured


@functools.cache
def parts(pairs: int, tokens: int, processors: int) -> int:
    """Parts of the tokens of each of `pairs` of sequence and tile of rows, which have at most `tokens`.

    The smallest number with the least time: waves of CTAs times what each takes, its tiles of tokens and START.
    """
    shortest = SHORTEST if pairs * -(-tokens // SHORTEST) <= processors // 2 else SHORT
    most = max(1, min(MOST_PARTS, tokens // shortest, 4 * processors // pairs))
    tiles = -(-tokens // TILE)
    return min(
        range(1, most + 1), key=lambda count: (-(-pairs * count // processors) * (-(-tiles // count) + START), count)
    )


@functools.cache
def row_tile(problem: Problem) -> int:
    """16, 32 or 64 rows of a CTA, or what is left of the last two: what `time_us` expects to take the least time.

    Few rows start at once and divide a short call among more CTAs; many read the tokens fewer times.
    """
    rows = problem.heads * problem.sq
    if rows <= 16:
        return 16
    many = (64,) if problem.code == "float" else (32, 64)
    return min((16, *((32,) if rows <= 32 else many)), key=lambda tile: time_us(problem, tile))


def time_us(problem: Problem, tile: int) -> float:
    """Expected time of a call with tiles of so many rows."""
    p, (start, each) = problem, COSTS[problem.code][tile]
    rows = p.heads * p.sq
    pairs = p.batch * -(-rows // tile)
    count = parts(pairs, p.longest, PROCESSORS)
    waves = -(-pairs * count // PROCESSORS)
    tiles = -(-p.longest // TILE)
    merge = MERGE + MERGE_ROWS * p.batch * rows if count > 1 else 0.0
    return waves * (start + each * -(-tiles // count)) + merge
