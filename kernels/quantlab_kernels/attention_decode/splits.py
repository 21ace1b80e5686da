"""How many parts the tokens of a sequence are dealt out to: more programs than a batch has heads keep a GPU busy."""

from __future__ import annotations

from quantlab_kernels.common.backends import remembered

LEAST = 256  # tokens that are worth a program
MOST = 128  # parts
FULL = 0.92  # a last wave that is as good as full
CLUSTER = 8  # CTAs of a cluster that every GPU runs
NEARLY = 0.97  # of the least time, which is as good
SHORT, SHORTEST = 512, 128  # tokens of a part that are quickly read, and that are worth a CTA of a cluster


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
    Else the smallest number of parts that is nearly as quick as any, time being waves of programs times tiles of each.
    """
    cluster = min(CLUSTER, processors // 2 // pairs, -(-tokens // SHORTEST))
    if cluster > 1 and tokens <= cluster * SHORT:
        return cluster, True
    slots = ctas * processors
    most = max(1, min(MOST, -(-tokens // LEAST), -(-4 * slots // pairs)))
    times = [-(-pairs * count // slots) * -(-tokens // (count * tile)) for count in range(1, most + 1)]
    return next(count for count, time in enumerate(times, 1) if NEARLY * time <= min(times)), False
