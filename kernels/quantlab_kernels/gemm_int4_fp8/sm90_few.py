"""Hopper backend for few tokens and small weights: `few.cu` of `gemm_fp8_block`, built with INT4."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from quantlab_kernels.common import nvrtc
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.int4 import Int4Problem
from quantlab_kernels.gemm_fp8_block import sm90_few
from quantlab_kernels.gemm_fp8_block.sm90_few import MOST_TOKENS, Config
from quantlab_kernels.gemm_int4_fp8 import sm90


def able(problem: Int4Problem) -> str | None:
    """Why it cannot run the problem at all, or None; `supports` also leaves aside what `sm90` does as fast."""
    if problem.m > MOST_TOKENS or problem.experts:
        return f"takes up to {MOST_TOKENS} tokens and no experts, this is M = {problem.m}"
    if problem.x != torch.float8_e4m3fn:
        return f"takes E4M3 activations, these are {problem.x}"
    reason = sm90.supports(problem)
    return None if reason is None else f"as `sm90`: {reason}"


def supports(problem: Int4Problem) -> str | None:
    reason = able(problem)
    if reason is None and not _faster(problem.m, problem.n, problem.k):
        return f"`sm90` is as fast for M = {problem.m} and a weight of {problem.n} x {problem.k}"
    return reason


def _faster(m: int, n: int, k: int) -> bool:
    """Where a sweep found it faster: `sm90` has a tile of 64 rows for each multiprocessor, and few of them here."""
    if m > 8:
        return n <= 1024 and n * k <= 5_000_000
    return n <= (2112 if m <= 4 else 2048) and n * k <= 32_000_000


@remembered
def config(problem: Int4Problem) -> Config:
    """The fastest of the same sweep, or nearly. One scale for each token multiplies the finished sums."""
    shape = _shape(problem.n, problem.k // 128)
    return replace(shape, tokens=8 if problem.m <= 8 else 16, row=int(not problem.grouped))


def _shape(n: int, blocks: int) -> Config:
    if blocks < 16:
        return Config(tiles=2, depth=1 if blocks <= 8 else 2)
    if blocks <= 24:
        return Config(tiles=2, warps=16)
    if n > 1600:
        return Config(tiles=2, warps=16, cluster=2)
    return Config(tiles=2, cluster=8 if n <= 1000 and blocks >= 48 else 4)


def candidates(problem: Int4Problem) -> list[Config]:
    """The chosen configuration and one of every other kind; all are legal for every problem."""
    return sm90_few.every_kind(config(problem))


def warmup(problems: Iterable[Int4Problem], *, workers: int = 8) -> int:
    """Compile what the problems need into the disk cache; returns how many kernels that are. Needs no GPU."""
    wanted = (sm90_few.source(config(p), p.out_dtype, p.bias, p.scale) for p in problems if supports(p) is None)
    return nvrtc.compile_all(wanted, workers=workers)


def launch(
    x: Tensor, token_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config
) -> None:
    """out [M, N] = x @ b^T + bias; see `op.gemm_int4_fp8` for the layouts."""
    sm90_few.launch(x, token_scale, b, b_scale, bias, out, config, int4=True)
