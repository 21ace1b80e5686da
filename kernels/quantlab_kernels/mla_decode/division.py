"""How a call is divided on Hopper: rows (heads times queries) of a CTA, and parts of each sequence's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.kv import Code

if TYPE_CHECKING:
    from quantlab_kernels.mla_decode.op import Problem

TILE = 64  # tokens
LARGEST = 64  # rows of a tile
MOST_PARTS = 128
SHORT, SHORTEST = 256, 128  # tokens that are worth a CTA, and that are where most processors are idle

# Microseconds that a CTA takes to start and end, and for each tile of tokens, by its rows. 16 rows are `sm90`'s, as are
# 32 of floats and all of INT8; the others are `sm90_rows`'s, of E4M3 and INT4 any number between and below, in
# proportion. Fitted to times on an H200, 512 latent channels: of 101 shapes of 20 to 256 heads; E4M3 and INT4, of 44
# shapes of 20 to 192 heads.
COSTS: dict[Code, dict[int, tuple[float, float]]] = {
    "float": {16: (4.7, 1.21), 32: (5.7, 1.99), 64: (5.8, 1.81)},
    "e4m3": {16: (5.2, 0.80), 32: (4.7, 1.13), 64: (8.4, 1.49)},
    "int4": {16: (6.2, 0.88), 32: (4.8, 1.10), 64: (7.9, 1.51)},
    "int8": {16: (5.2, 1.08), 32: (7.5, 1.63), 64: (11.2, 3.27)},
}
EVEN: dict[Code, tuple[int, int]] = {"e4m3": (24, 8), "int4": (32, 16)}  # fewest rows of `sm90_rows`, and steps
MERGE, MERGE_PART = 2.0, 1 / 2048  # microseconds of the second kernel, and to write and read a part of a row
PROCESSORS = 132  # of the GPU that was measured


@remembered
def parts(problem: Problem, tile: int, processors: int) -> int:
    """Parts of the tokens of each sequence: the smallest number with the least expected time."""
    p = problem
    pairs = p.batch * -(-p.heads * p.sq // tile)  # of sequence and tile of rows
    shortest = SHORTEST if pairs * -(-p.longest // SHORTEST) <= processors // 2 else SHORT
    most = max(1, min(MOST_PARTS, p.longest // shortest, 4 * processors // pairs))
    return min(range(1, most + 1), key=lambda count: (_time_us(p, tile, count, processors), count))


@remembered
def row_tile(problem: Problem) -> int:
    """Rows of a CTA, with which `time_us` expects the least time: 16, or an even share of E4M3 and INT4, or 32 or 64 of
    which the last tile may fill less.

    Few rows start at once and divide a short call among more CTAs; many read the tokens fewer times.
    """
    rows = problem.heads * problem.sq
    if rows <= 16:
        return 16
    if problem.code in EVEN:
        many = even_tiles(problem)
    else:
        many = (32,) if rows <= 32 else (64,) if problem.code == "float" else (32, 64)
    return min((16, *many), key=lambda tile: time_us(problem, tile))


def even_tiles(problem: Problem) -> tuple[int, ...]:
    """Of up to 64 rows, each an even share of the call's, rounded up to what the MMA of E4M3 or INT4 takes."""
    rows, (fewest, step) = problem.heads * problem.sq, EVEN[problem.code]
    counts = range(-(-rows // LARGEST), -(-rows // fewest) + 1)
    return tuple(sorted({max(-(-rows // (count * step)) * step, fewest) for count in counts}))


def _cost(code: Code, tile: int) -> tuple[float, float]:
    if tile in COSTS[code]:
        return COSTS[code][tile]
    low, high = COSTS[code][32], COSTS[code][64]
    share = (tile - 32) / 32
    return low[0] + share * (high[0] - low[0]), low[1] + share * (high[1] - low[1])


def time_us(problem: Problem, tile: int) -> float:
    """Expected time of a call with tiles of so many rows."""
    return _time_us(problem, tile, parts(problem, tile, PROCESSORS), PROCESSORS)


def _time_us(problem: Problem, tile: int, count: int, processors: int) -> float:
    """Waves of CTAs, times what each takes for its share of the tokens, and the second kernel."""
    p, (start, each) = problem, _cost(problem.code, tile)
    rows = p.heads * p.sq
    waves = -(-p.batch * -(-rows // tile) * count // processors)
    tiles = -(-p.longest // TILE)
    merge = MERGE + MERGE_PART * p.batch * rows * count if count > 1 else 0.0
    return waves * (start + each * -(-tiles // count)) + merge
