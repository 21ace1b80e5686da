"""Configurations of the Hopper kernel: what is legal, what a sweep tries, what is taken where nothing was tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm import round_up
from quantlab_kernels.common.int4 import GROUP, Int4Problem
from quantlab_kernels.gemm_fp8_block.sm90_configs import MAX_EXPERTS

SHARED_LIMIT = 232448  # bytes of shared memory that a CTA may have on compute capability 9.0
_TOKEN_SCALES = 8192  # bytes that are set aside where they hold the scales of all tokens
_REGISTERS = {1: 255, 2: 232, 3: 160, 4: 112}  # of a math thread, by math groups


@dataclass(frozen=True)
class Config:
    """How the kernel is built and launched.

    row_groups, k_groups, by, stages, band  the macros of `sm90.cu` in lower case
    prefetch  1: the next block's codes are read while the MMA of this one runs
    stream  0: tiles are given out whole; 1: those of the last, incomplete wave and of the one before it are cut along
            K; 2: all are
    split   CTAs of a cluster that share the K of one tile; more than one without `stream`
    token_scales  bytes for the scales of all groups of all tokens, copied once; 0: every stage brings its own
    early   1: the scales of tokens are read while the MMA runs, if they have any for each group
    parts   MMAs for which a block's codes are decoded once, each of `by / parts` tokens, two of them under way at a
            time; 1: one MMA, whose sums are promoted before the next begins
    """

    row_groups: int = 2
    k_groups: int = 1
    by: int = 16
    stages: int = 8
    prefetch: int = 1
    band: int = 8
    stream: int = 2
    split: int = 1
    token_scales: int = 0
    early: int = 0
    parts: int = 1

    @property
    def bx(self) -> int:
        return 64 * self.row_groups

    @property
    def math_groups(self) -> int:
        return self.row_groups * self.k_groups

    @property
    def threads(self) -> int:
        """Of the math groups and of the producers."""
        return 128 * (self.math_groups + 1)

    def shared_bytes(self, problem: Int4Problem) -> int:
        """Dynamic shared memory, as `sm90.cu` lays it out."""
        tokens = self.by * GROUP * problem.x.itemsize
        sorted_rows = problem.experts > 0
        token_scale = round_up(4 * (self.by + 4 * sorted_rows), 128) if problem.grouped and not self.token_scales else 0
        stage = tokens + self.bx * GROUP // 2 + self.bx * problem.scale.itemsize + token_scale
        output = 128 * self.by * self.row_groups if output_tma(problem) else 0
        reduced = (self.k_groups - 1 + self.split - 1) * self.bx * self.by * 4
        groups = sorted_rows * 8 * (MAX_EXPERTS + 1)
        return self.stages * (stage + 16) + 16 + output + reduced + self.token_scales + groups

    def tiles(self, problem: Int4Problem) -> int:
        return -(-problem.n // self.bx) * -(-problem.m // self.by)

    def schedule(self, problem: Int4Problem, sms: int) -> tuple[int, int]:
        """(CTAs, tiles that are cut along K). No CTA is given less than four blocks of K; where equal parts of a tile
        leave few CTAs idle they are equal, and an owner waits for as few others as can be."""
        tiles, blocks = self.tiles(problem), problem.k // GROUP
        if self.split > 1:
            return tiles * self.split, 0
        if self.stream == 0 or tiles * blocks * sms >= 1 << 32:
            return min(tiles, sms), 0
        ctas = min(sms, max(tiles, tiles * blocks // 4))
        if tiles < ctas and 16 * (ctas % tiles) <= ctas:
            ctas -= ctas % tiles
        rest = tiles % ctas
        streamed = tiles if self.stream == 2 or tiles <= ctas else rest + ctas if rest else 0
        return ctas, streamed


def output_tma(problem: Int4Problem) -> bool:
    """Whether the copy engine can write the result: 16-bit rows of a multiple of 16 bytes."""
    return problem.out_dtype.itemsize == 2 and problem.n % 8 == 0


def reject(config: Config, problem: Int4Problem) -> str | None:
    """Why the configuration cannot run the problem, or None."""
    shared = config.shared_bytes(problem)
    if shared > SHARED_LIMIT:
        return f"{shared} bytes of shared memory, {SHARED_LIMIT} are there"
    if config.math_groups not in _REGISTERS:
        return f"{config.math_groups} math groups, 1 to 4 fit on a multiprocessor"
    if config.parts > 1 and (problem.grouped or config.k_groups > 1 or config.by % (8 * config.parts)):
        return (
            f"{config.parts} parts of {config.by} tokens, which take multiples of 8 with one scale each, and all of K"
        )
    operands = 16 if problem.x.itemsize == 1 else 32
    under_way = 2 if config.parts > 1 else 1
    needed = config.by // 2 + under_way * (config.by // config.parts // 2 + operands) + 8 * config.prefetch + 16
    if needed > _REGISTERS[config.math_groups]:
        return f"about {needed} registers a thread, {_REGISTERS[config.math_groups]} are there"
    if config.split > 1 and (config.stream or problem.experts or problem.k // GROUP < config.split):
        return f"{config.split} CTAs for each tile, whose K of {problem.k} is cut otherwise"
    if config.token_scales and (not problem.grouped or problem.experts or problem.m > config.by):
        return "scales are copied at once of one tile's tokens, if those have any for each group of K"
    if 0 < config.token_scales < _token_scale_bytes(problem):
        return f"{config.token_scales} bytes for the scales of the tokens, which take {_token_scale_bytes(problem)}"
    turns = 2 if problem.grouped and not config.token_scales else 1  # a stage is given back behind the next MMA
    if config.stages % config.k_groups or config.stages < turns * config.k_groups:
        return f"{config.stages} stages for {config.k_groups} groups that take them in turns"
    return None


def _token_scale_bytes(problem: Int4Problem) -> int:
    return 4 * round_up(problem.m, 4) * (problem.k // GROUP)


@remembered
def deepest(config: Config, problem: Int4Problem, most: int = 24) -> Config:
    """With as many stages as shared memory holds, up to `most`."""
    turn = config.k_groups
    fitting = (replace(config, stages=stages) for stages in range(most - most % turn, turn, -turn))
    return next((c for c in fitting if c.shared_bytes(problem) <= SHARED_LIMIT), replace(config, stages=turn))


def candidates(problem: Int4Problem) -> list[Config]:
    """Legal configurations worth timing."""
    tried = (deepest(config, problem) for config in _family(problem))
    return [config for config in dict.fromkeys(tried) if reject(config, problem) is None]


def _family(problem: Int4Problem) -> Iterator[Config]:
    by = next((b for b in (16, 32, 64) if problem.m <= b), 128)
    few = ((1, 2, by, 1), (1, 4, by, 1), (2, 1, by, 1), (2, 2, by, 1), (3, 1, by, 1), (4, 1, by, 1))
    many = ((2, 1, 64, 1), (2, 1, 128, 1), (2, 1, 192, 1), (3, 1, 96, 0), (3, 1, 112, 1), (3, 1, 128, 0))
    for width, parts in ((128, 2), (192, 4)) if by == 128 else ():
        for stream in (0, 1, 2):
            yield Config(2, 1, width, prefetch=0, parts=parts, stream=stream)
    for rows, k_groups, width, prefetch in few if by < 128 else many:
        shape = Config(rows, k_groups, width, prefetch=prefetch)
        if reject(deepest(shape, problem), problem):
            shape = replace(shape, prefetch=0)
        for stream in (0, 1, 2):
            yield replace(shape, stream=stream)
    for rows, k_groups in ((1, 1), (1, 2), (1, 4)) if by < 128 else ((2, 1),):
        yield Config(rows, k_groups, by, stream=0, split=2)


def default(problem: Int4Problem) -> Config:
    """The configuration when nothing was tuned."""
    by = next((b for b in (16, 32, 64) if problem.m <= b), 128)
    if by == 128:
        return deepest(_many(problem) if problem.x.itemsize == 1 else _many_wide(problem), problem)
    chosen = _few(problem, by)
    if problem.grouped and _token_scale_bytes(problem) <= _TOKEN_SCALES:
        chosen = replace(chosen, token_scales=_TOKEN_SCALES)
    return deepest(chosen, problem)


def _few(problem: Int4Problem, by: int) -> Config:
    """Math groups stand side by side where there are rows enough, else they share out K. Two CTAs of a cluster share
    the K of a tile where such clusters fill the GPU; else a long K is cut evenly among all CTAs. A short one is not:
    handing sums over would cost more than processors that idle. (16-bit operands leave registers for fewer groups.)"""
    if problem.n >= 16384:
        return Config(4, 1, by, prefetch=0, stream=0) if by == 64 else Config(2, 2, by, stream=0)
    narrow, short = problem.x.itemsize == 1, problem.k <= 4096
    shape = Config(1, 4, by, prefetch=int(by < 64)) if narrow else Config(1, 2, by)
    if 48 <= shape.tiles(problem) <= 66 and (narrow or not short):
        return replace(shape, stream=0, split=2)
    return replace(shape, stream=0 if short else 2)


def _many(problem: Int4Problem) -> Config:
    """More than 64 tokens in 8 bits: tiles of a shape that gives each processor just one, if there is such a shape;
    else wide ones, and the ends of waves are cut along K."""
    if problem.m <= 128 and problem.n >= 16384:
        return Config(2, 1, 96 if problem.m <= 96 else 128, stream=0)
    if problem.m <= 96 and problem.k >= 8192:
        return Config(2, 1, 96)
    for shape in (Config(1, 2, 64), Config(1, 2, 128), Config(2, 1, 128)):
        if 96 <= shape.tiles(problem) <= 132:
            return replace(shape, stream=0)
    return Config(3, 1, 128, prefetch=0, stream=1) if problem.m > 512 or problem.n >= 16384 else Config(2, 1, 128)


def _many_wide(problem: Int4Problem) -> Config:
    """More than 64 tokens in 16 bits, whose codes take so long to decode that it pays to do it under an MMA."""
    if problem.m >= 2048:
        return Config(2, 1, 192, prefetch=0, parts=4, stream=1)
    return Config(2, 1, 128, prefetch=0, parts=2, stream=2 if problem.m <= 512 else 1)
