"""Tile sizes: what is legal, with the reason where it is not, and the default. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab_kernels.common.tuning import lookup

if TYPE_CHECKING:
    from quantlab_kernels.quantize_fp8.op import Problem

LONGEST_ROW = 16384


@dataclass(frozen=True)
class Config:
    """A program quantizes `rows` x `columns` elements with `num_warps` warps."""

    rows: int
    columns: int
    num_warps: int


def reject(config: Config, problem: Problem) -> str | None:
    """Why the configuration cannot run, or None."""
    if any(extent < 1 or extent & (extent - 1) for extent in (config.rows, config.columns, config.num_warps)):
        return "Triton's tiles and warps are powers of two"
    if problem.granularity == "block" and (config.rows, config.columns) != (128, 128):
        return "a block is one tile of 128x128"
    if problem.granularity == "group" and config.columns % 128:
        return "a tile holds whole groups of 128"
    if config.rows * config.columns > 512 * config.num_warps * 32:
        return "more than 512 elements per thread spill"
    if config.rows * config.columns < config.num_warps * 32:
        return "fewer elements than threads"
    return None


def default(problem: Problem) -> Config:
    """32 elements a thread, which is within 4 % of the best of a sweep on an H200; hence no table for it."""
    if problem.granularity == "block":
        return Config(128, 128, 8)
    if problem.granularity == "group":
        rows, columns = min(8, _power2(problem.m)), min(512, max(128, _power2(problem.k)))
    else:
        columns = min(max(_power2(problem.k), 128), LONGEST_ROW)
        rows = min(max(1, 2048 // columns), _power2(problem.m))
    return Config(rows, columns, min(8, max(1, rows * columns // 1024)))


def candidates(problem: Problem) -> Iterator[Config]:
    """What a sweep tries."""
    if problem.granularity == "block":
        options = [Config(128, 128, warps) for warps in (4, 8, 16)]
    elif problem.granularity == "group":
        tiles = [(rows, columns) for rows in (1, 4, 8, 16, 32, 64) for columns in (128, 256, 512, 1024)]
        options = [Config(r, c, warps) for r, c in tiles for warps in (1, 2, 4, 8) if 8 <= r * c // (32 * warps) <= 128]
    else:
        columns = min(max(_power2(problem.k), 128), LONGEST_ROW)
        options = [Config(rows, columns, warps) for rows in (1, 2, 4) for warps in (4, 8, 16, 32)]
    return (option for option in options if reject(option, problem) is None)


def choose(problem: Problem) -> Config:
    """The tuned configuration of the nearest problem on this GPU, else the default."""
    found = lookup("quantize_fp8", problem.granularity, n=0, k=problem.k, m=problem.m)
    config = Config(**found) if found else default(problem)
    return config if reject(config, problem) is None else default(problem)


def _power2(extent: int) -> int:
    return 1 << max(0, extent - 1).bit_length()
