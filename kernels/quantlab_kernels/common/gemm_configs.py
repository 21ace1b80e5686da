"""Configurations of the Triton GEMMs: which are legal and why not, which a sweep tries, which is taken untuned.

Pure functions that need no triton and no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.tuning import lookup

STEP = 128  # of K: the group of activation scales, and the longest sum that stays in the tensor core


@dataclass(frozen=True)
class Config:
    """Tile of the output, pipeline depth and schedule of one launch.

    group_m  tiles along M that run side by side, so that they find b in L2
    split_k  programs that share one tile's K
    swap     compute the transposed product
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    split_k: int = 1
    swap: bool = False


# Shared memory that a block may use, for problems posed where no GPU is at hand.
SMEM_BYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}


def smem_bytes(sm: int) -> int:
    """Shared memory per block of a compute capability; of an unknown one, the least that any has had since sm_80."""
    return SMEM_BYTES.get(sm, 99) * 1024


def reject(config: Config, problem: GemmProblem) -> str | None:
    """Why the configuration cannot run the problem, or None."""
    c = config
    if any(extent < 1 or extent & (extent - 1) for extent in (c.block_m, c.block_n, c.num_warps)):
        return "Triton's tiles and warps are powers of two"
    if min(c.block_m, c.block_n) < 16:
        return "a tile side below 16 is not a shape of the matrix instruction"
    element_bytes = 1 if problem.sm >= 89 else 3  # below sm_89 the decoded float16 tiles lie beside the codes
    if c.num_stages * (c.block_m + c.block_n) * STEP * element_bytes > smem_bytes(problem.sm):
        return "the pipeline does not fit into shared memory"
    if c.block_m * c.block_n > 128 * c.num_warps * 32:
        return "more than 128 sums per thread, beside the product of one step, spill"
    if c.split_k > max(1, problem.k // STEP):
        return "fewer steps of K than programs to share them"
    return None


def default(problem: GemmProblem) -> Config:
    """Without a table: 64x128 tiles, or 64x64 where those would leave multiprocessors idle, and K split until two
    programs per multiprocessor (of 132) have work. This is what the sweep on an H200 found, less its details.
    """
    m, n, k = problem.m, problem.n, problem.k
    if m > 64:
        block_n = 128 if -(-m // 64) * -(-n // 128) >= 264 else 64
        config = Config(64, block_n, num_stages=4, group_m=16)
    else:
        block_m = 16 if m <= 16 else 32 if m <= 32 else 64
        split = 1
        while -(-n // 64) * split < 264 and split < 8 and k // STEP >= 8 * split:
            split *= 2
        config = Config(block_m, 64, num_stages=4, group_m=1, split_k=split)
    while reject(config, problem) and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def candidates(problem: GemmProblem) -> Iterator[Config]:
    """What a sweep tries: a few dozen, chosen by the side of the roofline that M is on."""
    options: list[Config] = []
    native = problem.sm >= 89  # else tiles take three times the shared memory
    if problem.m > 64:
        for (bm, bn, warps), stages, group in product(
            ((64, 128, 4), (64, 256, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (64, 64, 4)),
            (3, 4, 5) if native else (2, 3),
            (1, 8, 16),
        ):
            options.append(Config(bm, bn, warps, stages, group))
    else:
        block_m = max(16, 1 << (problem.m - 1).bit_length())
        for bn, stages, split, (swap, warps) in product(
            (32, 64, 128), (4, 6, 8) if native else (2, 3), (1, 2, 4, 8), ((False, 4), (True, 4), (False, 8))
        ):
            if not (swap and bn < 64):
                options.append(Config(block_m, bn, warps, stages, 1, split, swap))
    return (option for option in options if reject(option, problem) is None)


def choose(room: str, problem: GemmProblem) -> Config:
    """The tuned configuration of the nearest problem on this GPU, else the default."""
    found = lookup(room, "triton", n=problem.n, k=problem.k, m=problem.m)
    config = Config(**found) if found else default(problem)
    return config if reject(config, problem) is None else default(problem)
