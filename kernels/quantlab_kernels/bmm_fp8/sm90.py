"""Hopper backend: `sm90.cu`, compiled at run time by NVRTC."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.bmm_fp8.op import Problem
from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.launches import aligned, settled

_FOLDER = Path(__file__).parent
_INPUT = {torch.bfloat16: 1, torch.float16: 2}
_WARPS = 4
_CTAS = 528  # four on each multiprocessor of an H200
# Most tokens for which nothing faster was measured: with few heads, and with many; not transposed, transposed.
_MOST = {(True, False): 8, (True, True): 16, (False, False): 128, (False, True): 64}


@dataclass(frozen=True)
class Config:
    """Tiles of 16 columns in a warp (which has 256 / tiles of K), tiles of 8 tokens at once, and how many CTAs share
    the tokens of the same weights."""

    tiles: int
    tokens: int
    shares: int = 1

    def columns(self, transposed: bool) -> int:
        """Columns of a CTA."""
        return 16 * self.tiles if transposed else 128


def supports(problem: Problem) -> str | None:
    reason = able(problem)
    most = _MOST[problem.heads < 64, problem.transposed]
    if reason is None and problem.m > most:
        return f"left to Triton with more than {most} tokens, these are {problem.m}"
    return reason


def able(problem: Problem) -> str | None:
    """Why it cannot run the problem at all, or None; `supports` also leaves aside what others do better."""
    p = problem
    if p.sm != 90:
        return f"compiled for sm_90 only, the GPU is sm_{p.sm}"
    if p.dtype not in _INPUT:
        return f"multiplies 16-bit activations, these are {p.dtype}"
    if p.columns % 128 or any(x % 32 for x in (p.rows, p.first, p.count)):
        return f"needs columns in multiples of 128, rows of heads and slices in multiples of 32; this is {p}"
    return nvrtc.missing()


@remembered
def config(problem: Problem) -> Config:
    """Wide loads for few tokens, else all of K in a warp, where blocks of scales allow it. Tokens are shared out while
    there are multiprocessors for it."""
    p = problem
    if p.transposed:
        tiles, tokens = 2, 1 if p.m <= 8 else 2
    else:
        unit = math.gcd(128, p.rows, p.first, p.count)  # of K, never crosses a border of blocks
        tiles, tokens = (8, 1) if p.m <= 8 or unit == 32 else (256 // unit, 2)
    columns = Config(tiles, tokens).columns(p.transposed)
    groups = -(-p.m // (8 * tokens))
    return Config(tiles, tokens, max(1, min(groups, _CTAS // (p.heads * p.n // columns))))


def source(transposed: bool, n: int, k: int, dtype: torch.dtype, tiles: int, tokens: int) -> nvrtc.Source:
    """What is compiled."""
    macros = {"TRANSPOSED": int(transposed), "N": n, "K": k, "INPUT": _INPUT[dtype], "TILES": tiles, "TOKENS": tokens}
    headers = {"sm90.cuh": (_FOLDER.parent / "common/sm90.cuh").read_text()}
    return nvrtc.Source("bmm_fp8", (_FOLDER / "sm90.cu").read_text(), headers, macros)


def key(problem: Problem, config: Config) -> tuple[Any, ...]:
    """Arguments of `source`."""
    return problem.transposed, problem.n, problem.k, problem.dtype, config.tiles, config.tokens


@functools.cache
def _kernel(*given: Any) -> driver.Kernel:
    return driver.Kernel(nvrtc.cubin(source(*given)), "bmm_fp8")


def launch(problem: Problem, a: Tensor, w: Tensor, w_scale: Tensor, out: Tensor, config: Config) -> None:
    """Fill out [M, H, N]; w and w_scale contiguous, of a only the last dimension."""
    p, c, w = problem, config, aligned(w)
    if a.data_ptr() % 16 or a.stride(0) % 8 or a.stride(1) % 8:  # a thread reads eight at once
        a = aligned(a.contiguous())
    share = -(-p.m // (8 * c.tokens * c.shares)) * 8 * c.tokens
    params = struct.pack(
        "<4Q2q8i", a.data_ptr(), w.data_ptr(), w_scale.data_ptr(), out.data_ptr(), a.stride(0), a.stride(1), p.m,
        p.heads, p.rows, p.columns, p.first, w_scale.stride(0), c.shares, share,
    )  # fmt: skip
    ctas = p.heads * p.n // c.columns(p.transposed) * c.shares
    shape = driver.Launch(ctas, 32 * _WARPS, 1, 0, early=settled(w) & settled(w_scale))
    _kernel(*key(p, c)).launch(shape, params, a.get_device())
