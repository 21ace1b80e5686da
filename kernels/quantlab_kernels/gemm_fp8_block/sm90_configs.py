"""Configurations of the Hopper kernel: what is legal, what each should cost, which to take when nothing was tuned.

The model counts waves of tiles and the cycles of one K block in each kind of tile against the bytes that have to come
from memory. It ranks candidates; the tuned table decides between the first few.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantlab_kernels.common.gemm import GemmProblem, round_up

MAX_EXPERTS = 512  # whose rows the kernel finds
SHARED_LIMIT = 232448  # bytes of shared memory that a CTA may have on compute capability 9.0
SHARED_HALF = 115712  # with which two CTAs, of this launch and the next, find room on a multiprocessor

# Of the cost model; fitted to the 4680 times of a sweep over 360 problems on one H200 (2026-11). They order candidates
# and are no measurements of what they are named after.
_CLOCK = 1.6e3  # cycles per microsecond
_HBM = 4.7e6  # bytes per microsecond
_L2 = 9.9e6
_LATENCY = 0.75  # microseconds from the request of a byte to its arrival
_LAUNCH = 2.2  # microseconds


@dataclass(frozen=True)
class Config:
    """How the kernel is built and launched; the macros of `sm90.cu` in lower case."""

    by: int = 128
    waves: int = 1
    math_groups: int = 2
    stages: int = 6
    cluster_x: int = 1
    split: int = 1
    tail: int = 1
    stream: int = 0
    temps: int = 1
    output_tma: int = 1
    pieces: int = 1
    swap: int = 0
    group: int = 8
    grouped: int = 0
    row: int = 0
    unroll: int = 0
    rotate: int = 0

    @property
    def bx(self) -> int:
        return 64 * self.waves * self.math_groups

    @property
    def cluster(self) -> int:
        return self.cluster_x * self.split

    @property
    def piece_columns(self) -> int:
        """Columns of one store through the copy engine."""
        return next(columns for columns in (64, 32, 16, 8) if self.by // self.split % columns == 0)

    def shared_bytes(self) -> int:
        """Dynamic shared memory, as `sm90.cu` lays it out."""
        share = self.by // self.split
        tokens, channels = (share, self.bx) if self.swap else (self.bx, share)
        if self.output_tma:
            output = self.pieces * self.math_groups * 64 * self.piece_columns * 2
        else:
            output = tokens * (channels + (4 if self.swap else 8)) * 4
        output = round_up(output, 128) + (self.split - 1) * share // 2 * 4 * 2 * self.bx
        tokens, channels = (self.by, self.bx) if self.swap else (self.bx, self.by)
        span = next(s for s in (128, 64, 32, 16, 8) if channels % s == 0)
        scales = round_up((tokens + 4 * self.grouped) * 4, 128) * self.stages
        scales += round_up(self.stages * (channels // span) * 4, 8)
        scales *= 1 - self.row
        groups = self.grouped * 8 * (MAX_EXPERTS + 1)
        return (self.bx + self.by) * 128 * self.stages + output + scales + 8 * (2 * self.stages + 2) + groups

    @property
    def hands_over(self) -> bool:
        """Whether CTAs give each other sums through global memory."""
        return self.tail > 1 or self.stream > 0

    def token_tiles(self, m: int) -> int:
        return -(-m // (self.by if self.swap else self.bx))

    def ctas(self, m: int, n: int, sms: int) -> int:
        """CTAs of a launch."""
        tiles, at_once = self.grid(m, n, sms)
        if self.stream:
            return sms // self.token_tiles(m) * self.token_tiles(m)
        return (at_once if self.tail > 1 else min(tiles // self.cluster_x, at_once)) * self.cluster

    def grid(self, m: int, n: int, sms: int) -> tuple[int, int]:
        """(tiles that are made, CTA clusters that run at once)."""
        x, y = (n, m) if self.swap else (m, n)
        tiles = -(-x // (self.bx * self.cluster_x)) * -(-y // self.by)
        return tiles * self.cluster_x, clusters_at_once(self.cluster, sms)


def clusters_at_once(size: int, sms: int) -> int:
    """Clusters that the GPU holds at once. Those of four and more do not fill every cluster of processors: 30 and 15 of
    them run on the 132 processors of an H200 (cuOccupancyMaxActiveClusters), not 33 and 16."""
    return sms // size if size <= 2 else (sms - sms // 11) // size


def reject(config: Config, problem: GemmProblem) -> str | None:
    """Why the configuration cannot run the problem, or None."""
    if config.shared_bytes() > SHARED_LIMIT:
        return f"{config.shared_bytes()} bytes of shared memory, {SHARED_LIMIT} are there"
    if config.output_tma and (problem.out_dtype.itemsize != 2 or problem.n % 8):
        return "the copy engine writes 16-bit rows of a multiple of 16 bytes"
    if config.output_tma and config.swap:
        return "swapped results are transposed through shared memory"
    if config.stream and (config.split > 1 or config.tail > 1 or config.grouped):
        return "tiles are cut along K in one way, and those of experts not at all"
    if config.stream and config.cluster_x > 1 and (config.swap or config.token_tiles(problem.m) % config.cluster_x):
        return "the CTAs of a cluster share weights and have different tokens"
    if config.stream and 8 * config.token_tiles(problem.m) > 132:
        return f"{config.token_tiles(problem.m)} tiles of tokens leave few CTAs for each"
    if config.unroll and unrolled(replace(config, unroll=0), problem.k) != config:
        return f"the unrolled loop takes tall tiles, whole, and rings of {config.stages} blocks, K is {problem.k}"
    if config.rotate and (config.tail > 1 or config.stream):
        return "CTAs that hand sums over keep their places"
    if config.split > problem.k // 128:
        return f"{config.split} parts of {problem.k // 128} blocks of K"
    return None


# 64 rows of X in each of three math groups: while one adds up, two multiply. The most even tensor-core load there is.
_THREE = Config(math_groups=3, stages=4, pieces=2)
_TWO = Config(temps=2)
_ONE = Config(math_groups=1, temps=2)
_SPLIT = Config(temps=2, stages=5, pieces=2, split=2)
_WAVES = Config(waves=2, stages=3, pieces=3)


def candidates(problem: GemmProblem) -> list[Config]:
    """Legal configurations worth timing, best estimate first."""
    tried = [c for c in _family(problem) if reject(c, problem) is None]
    return sorted(dict.fromkeys(tried), key=lambda config: estimate_us(config, problem))


def _family(problem: GemmProblem) -> Iterator[Config]:
    if problem.m <= 128:
        yield from _swapped(problem)
    if problem.out_dtype.itemsize != 2 or problem.n % 8:
        yield Config(temps=2, stages=4, output_tma=0)
        yield Config(temps=2, stages=3, output_tma=0, split=2)
        yield Config(by=64, temps=2, stages=6, output_tma=0)
        return
    if 32 < problem.m <= 64:
        yield from _single()
    for tail in (1, 4):
        for group in (11, 6):
            yield unrolled(replace(_THREE, group=group, tail=tail), problem.k)
        yield replace(_TWO, tail=tail)
        yield replace(_WAVES, tail=tail)
    yield replace(_WAVES, stages=4, pieces=1)
    yield replace(_TWO, stream=1)
    yield replace(_TWO, stream=1, cluster_x=2)
    yield replace(_TWO, group=2)
    yield replace(_TWO, cluster_x=2)
    yield _SPLIT
    for by, stages in ((64, 7), (96, 7)):
        yield Config(by=by, temps=2, stages=stages)
        yield Config(by=by, temps=2, stages=stages, cluster_x=2)
    yield Config(by=64, temps=2, stages=7, split=2)
    yield Config(by=64, temps=2, stages=6, split=4)
    yield Config(by=192, stages=5)


def _single() -> Iterator[Config]:
    """64 tokens on the M side of the MMA: no half of a tile is empty, and a scale of a token serves a row."""
    for by in (64, 128):
        yield deepest(replace(_ONE, by=by))
        yield deepest(replace(_ONE, by=by, split=2))
    yield deepest(replace(_ONE, temps=1))


def _swapped(problem: GemmProblem) -> Iterator[Config]:
    """Weights on the M side of the MMA, tokens on its N side."""
    by = next(b for b in (16, 32, 64, 128) if problem.m <= b)
    for split in (1, 2, 4, 8):
        width = max(by, 8 * split)
        for waves, groups in ((1, 1), (1, 2), (2, 2)):
            shape = Config(by=width, waves=waves, math_groups=groups, split=split, swap=1, output_tma=0)
            if _fits(shape):
                yield deepest(shape)
                yield shallow(deepest(shape), problem)
    if by >= 64:
        yield deepest(Config(by=by, swap=1, output_tma=0, stream=1))
        if _fits(shape := Config(by=by, swap=1, output_tma=0, cluster_x=2)):
            yield deepest(shape)


def _fits(config: Config) -> bool:
    return replace(config, stages=3).shared_bytes() <= SHARED_LIMIT


def unrolled(config: Config, k: int) -> Config:
    """With the loop over the ring unrolled, where a tile of many tokens is whole rings."""
    whole = config.tail == config.split == 1 and not config.stream and k % (128 * config.stages) == 0
    return replace(config, unroll=1) if whole and config.math_groups == 3 and not config.swap else config


@functools.cache
def deepest(config: Config, most: int = 20) -> Config:
    """With as many stages as shared memory holds, up to `most`."""
    return next(c for s in range(most, 2, -1) if (c := replace(config, stages=s)).shared_bytes() <= SHARED_LIMIT)


def shallow(config: Config, problem: GemmProblem) -> Config:
    """With a ring that leaves half of a multiprocessor to the next launch, which fills its own meanwhile. A product of
    few tokens gains by it more than it loses, unless a CTA has many blocks of K."""
    tiles, at_once = config.grid(problem.m, problem.n, 132)
    blocks = -(-problem.k // 128 // config.split)
    if problem.m > 16 or not config.swap or config.math_groups > 1 or tiles > at_once or blocks > 32:
        return config
    fitting = (replace(config, stages=s) for s in range(min(config.stages, max(3, blocks)), 2, -1))
    return next((c for c in fitting if c.shared_bytes() <= SHARED_HALF), config)


def estimate_us(config: Config, problem: GemmProblem, sms: int = 132) -> float:
    """Rough time of the configuration; good enough to order candidates."""
    m, n, blocks = problem.m, problem.n, problem.k // 128
    tiles, at_once = config.grid(m, n, sms)
    at_once *= config.cluster_x
    waves, rest = divmod(tiles, at_once)
    parts = max(1, min(at_once // rest, config.tail, blocks // 4)) if rest else 1
    depth = tiles / at_once if config.stream else waves + (1 / parts if rest else 0)

    mma = 2 * config.bx * config.by / 64  # cycles of the tensor cores for one block of K
    hidden = config.swap and config.math_groups == 1 and config.shared_bytes() <= SHARED_HALF and tiles <= at_once
    pause = (170 if hidden else 110) if config.swap else 53  # cycles between blocks
    compute = depth * blocks / config.split * (mma / _efficiency(config) + pause) / _CLOCK
    in_flight = min(tiles, at_once) * config.split * config.stages * 128 * (config.bx if config.swap else config.by)
    compulsory = n * problem.k + m * problem.k + m * n * problem.out_dtype.itemsize
    memory = compulsory / min(_HBM, in_flight / _LATENCY)
    loaded = tiles * blocks * 128 * (config.bx + config.by / config.cluster_x)

    output = 0.1 * depth + 0.9 * config.bx * config.by / config.split / 2**14
    sums = (0.06 * config.split**2 if hidden else 1 + 0.2 * config.split) if config.split > 1 else 0
    exchange = sums + (6.5 * parts**0.5 if parts > 1 else 0)
    exchange += 3.5 * config.stream
    sharing = 1.0 if config.cluster_x == 1 else 1.3  # CTAs that wait for each other; wins are rare and hard to foresee
    return max(compute, memory, loaded / _L2) * sharing + _LAUNCH + output + exchange


def _efficiency(config: Config) -> float:
    """Share of the tensor cores' cycles that the inner loop keeps."""
    if config.swap:
        return 0.25 if config.by <= 32 else 0.45
    if config.math_groups == 3:
        return 0.89
    if config.math_groups == 1:
        return 0.5
    if config.waves == 2:
        return 0.78
    return {64: 0.75, 96: 0.7, 192: 0.81}.get(config.by, 0.92)


def default(problem: GemmProblem) -> Config:
    """The configuration when nothing was tuned: the best estimate."""
    return candidates(problem)[0]
