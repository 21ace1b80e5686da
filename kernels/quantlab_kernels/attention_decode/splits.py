"""How many parts the tokens of a sequence are dealt out to: more programs than a batch has heads keep a GPU busy."""

from __future__ import annotations

import math

from quantlab_kernels.common.backends import remembered

LEAST = 256  # tokens that are worth a program
MOST = 128  # parts
FULL = 0.92  # a last wave that is as good as full
CLUSTER = 8  # CTAs of a cluster that every GPU runs
SHORT, SHORTEST = 512, 128  # tokens of a part that are quickly read, and that are worth a CTA of a cluster

# What a wave of CTAs and merging cost, in tiles of a CTA on a full GPU, and a tile of a CTA that has a processor for
# itself. Fitted to times on an H200: some 40 shapes, FP8 and INT4, 64 to 256 channels a head.
START, ALONE = 2.5, 0.75
MERGE, MERGE_PART = 2.0, 0.2  # the second kernel, and, for each processor, a part that is written and read


@remembered
def splits(pairs: int, tokens: int, slots: int) -> int:
    """Parts for `pairs` of sequence and head with at most `tokens` each, on a GPU that runs `slots` programs at once.

    The smallest number whose last wave is nearly as full as the best number's (FlashAttention-3's rule: within 85 %;
    here 92 %). Each part of a sequence is a share of its length on the device, so a wrong `tokens` costs only time.
    """
    most = max(1, min(MOST, -(-tokens // LEAST), -(-4 * slots // pairs)))
    full = [_fullness(pairs * count, slots) for count in range(1, most + 1)]
    return next(count for count, share in enumerate(full, 1) if share >= FULL * max(full))


def _fullness(programs: int, slots: int) -> float:
    waves = programs / slots
    return waves / -(-programs // slots)


@remembered
def shares(pairs: int, tokens: int, ctas: int, processors: int, tile: int) -> tuple[int, bool]:
    """(parts, whether they are a cluster's CTAs, which add up by themselves) for programs that run `ctas` at a time on
    each of the processors and read `tile` tokens at a time, all warps together.

    A cluster saves a launch and a way through memory. Few of them run at once, so it is for few and short sequences.
    Else the number of parts with the least expected time, or one that is a few less with as many whole tiles each: 33
    parts of 128 tiles would leave warps of others a tile to wait for.
    """
    cluster = min(CLUSTER, processors // 2 // pairs, -(-tokens // SHORTEST))
    if cluster > 1 and tokens <= cluster * SHORT:
        return cluster, True
    most = max(1, min(MOST, -(-tokens // LEAST), -(-4 * ctas * processors // pairs)))
    tiles = tokens / tile
    best = min(range(1, most + 1), key=lambda count: _time(count, pairs, tiles, ctas, processors))
    few_less = range(best - best // 20, best + 1)
    return next(count for count in few_less if math.ceil(tiles / count) == math.ceil(tiles / best)), False


def _time(count: int, pairs: int, tiles: float, ctas: int, processors: int) -> float:
    """Of `count` parts of each pair's tiles, in tiles of a full GPU; merging included."""
    programs, share = pairs * count, tiles / count
    waves, rest = divmod(programs, ctas * processors)
    time = waves * (START + share)
    if rest:
        time += START + share * (ALONE if rest <= processors < ctas * processors else 1.0)
    return time + (MERGE + MERGE_PART * programs / processors if count > 1 else 0.0)
