"""Configurations of the Hopper kernel: what is legal, what a sweep tries, what is taken where nothing was tuned."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantlab_kernels.common.gemm import round_up
from quantlab_kernels.common.int4 import GROUP, Int4Problem
from quantlab_kernels.gemm_fp8_block.sm90_configs import MAX_EXPERTS

SHARED_LIMIT = 232448  # bytes of shared memory that a CTA may have on compute capability 9.0
_REGISTERS = {1: 255, 2: 232, 3: 160, 4: 112}  # of a math thread, by math groups


@dataclass(frozen=True)
class Config:
    """How the kernel is built and launched.

    row_groups, k_groups, by, stages, band  the macros of `sm90.cu` in lower case
    prefetch  1: the next block's codes are read while the MMA of this one runs; 2: and decoded
    stream  0: tiles are given out whole; 1: those of the last, incomplete wave and of the one before it are cut along
            K; 2: all are
    expand  1: the codes become E4M3 in memory first, which many tokens pay for
    split   CTAs of a cluster that share the K of one tile; more than one without `stream`
    """

    row_groups: int = 2
    k_groups: int = 1
    by: int = 16
    stages: int = 8
    prefetch: int = 1
    band: int = 8
    stream: int = 2
    expand: int = 0
    split: int = 1

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
        token_scale = round_up(4 * (self.by + 4 * sorted_rows), 128) if problem.grouped else 0
        stage = tokens + self.bx * GROUP // (1 if self.expand else 2) + self.bx * problem.scale.itemsize + token_scale
        output = 128 * self.by * self.row_groups if output_tma(problem) else 0
        reduced = (self.k_groups - 1 + self.split - 1) * self.bx * self.by * 4
        return self.stages * (stage + 16) + 8 + output + reduced + sorted_rows * 8 * (MAX_EXPERTS + 1)

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
    if config.expand and problem.x.itemsize > 1:
        return "weights are expanded for E4M3 activations only"
    operands = 0 if config.expand else 16 if problem.x.itemsize == 1 else 32
    needed = config.by + operands + {0: 16, 1: 24, 2: 24 + operands}[config.prefetch]
    if needed > _REGISTERS[config.math_groups]:
        return f"about {needed} registers a thread, {_REGISTERS[config.math_groups]} are there"
    if config.split > 1 and (config.stream or problem.experts or problem.k // GROUP < config.split):
        return f"{config.split} CTAs for each tile, whose K of {problem.k} is cut otherwise"
    if config.stages % config.k_groups or not config.stages:
        return f"{config.stages} stages for {config.k_groups} groups that take them in turns"
    return None


@functools.cache
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
    few = ((1, 2, by, 1), (1, 4, by, 1), (2, 1, by, 1), (2, 2, by, 1), (2, 2, by, 2), (3, 1, by, 1), (4, 1, by, 1))
    many = (
        (2, 1, 64, 1),
        (2, 1, 96, 2),
        (2, 1, 128, 2),
        (2, 1, 160, 2),
        (2, 1, 192, 1),
        (3, 1, 112, 1),
        (3, 1, 128, 0),
    )
    for rows, k_groups, width, prefetch in few if by < 128 else many:
        shape = Config(rows, k_groups, width, prefetch=prefetch)
        while shape.prefetch and reject(deepest(shape, problem), problem):
            shape = replace(shape, prefetch=shape.prefetch - 1)
        for stream in (0, 1, 2):
            yield replace(shape, stream=stream)
    for k_groups, split in ((1, 2), (2, 2), (4, 2), (2, 4)) if by < 128 else ():
        yield Config(1, k_groups, by, stream=0, split=split)
    for width in (128, 64) if by == 128 else ():
        yield Config(2, 1, width, stream=0, split=2)
    for rows, width in ((3, 128), (2, 192), (2, 128)) if by == 128 else ():
        yield Config(rows, 1, width, prefetch=0, stream=1, expand=1)


def default(problem: Int4Problem) -> Config:
    """The configuration when nothing was tuned.

    For few tokens math groups stand side by side where there are rows enough, else they share out K. K is cut among
    CTAs where it is long; where it is short the hand-over would cost more than the processors that stay idle."""
    by = next((b for b in (16, 32, 64) if problem.m <= b), 128)
    short, wide, fp8 = problem.k <= 4096, problem.n >= 16384, problem.x.itemsize == 1
    if by == 128:
        chosen = _many(problem.m <= 512, wide, fp8)
    elif wide:
        chosen = Config(4, 1, by, prefetch=0, stream=0) if by == 64 else Config(2, 2, by, stream=0)
    elif by == 64 and not fp8:
        chosen = Config(2, 2, by, prefetch=0, stream=0 if short else 2)
    else:
        chosen = Config(1, 2, by, stream=0 if short else 2)
    return deepest(chosen, problem)


def _many(few_tiles: bool, wide: bool, fp8: bool) -> Config:
    """For more than 64 tokens: the widest tile that the registers hold, and ends of waves cut along K."""
    if not fp8:
        return Config(2, 1, 128, prefetch=0, stream=2 if few_tiles else 1)
    return Config(2, 1, 128, stream=2) if few_tiles and not wide else Config(3, 1, 128, prefetch=0, stream=1)
