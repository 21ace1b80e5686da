"""Hopper backend for few tokens and small weights: `few.cu`, compiled by NVRTC, one kernel per configuration."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.launches import address, aligned, settled
from quantlab_kernels.gemm_fp8_block import sm90

_FOLDER = Path(__file__).parent
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_TOKENS = 16
_ONE_WAVE = 132 * 32  # channels: as many CTAs of two tiles as an H200 has multiprocessors


@dataclass(frozen=True)
class Config:
    """How the kernel is built; the macros of `few.cu` in lower case."""

    tiles: int = 1
    warps: int = 8
    depth: int = 1
    cluster: int = 1
    tokens: int = 8
    row: int = 0

    @property
    def at_once(self) -> int:
        """CTAs that a multiprocessor shall have room for."""
        return min(16 // self.warps, 3)


def able(problem: GemmProblem) -> str | None:
    """Why it cannot run the problem at all, or None; `supports` also leaves aside what `sm90` does as fast."""
    if problem.m > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, this is M = {problem.m}"
    reason = sm90.supports(problem)
    return None if reason is None else f"as `sm90`: {reason}"


def supports(problem: GemmProblem) -> str | None:
    reason = able(problem)
    if reason is None and not _faster(problem.m, problem.n, problem.k):
        return f"`sm90` is as fast for M = {problem.m} and a weight of {problem.n} x {problem.k}"
    return reason


def _faster(m: int, n: int, k: int) -> bool:
    """Where a sweep found it faster than `sm90`, alone and behind the quantization of its tokens; see the README."""
    if m > 8:
        return n * k <= 1_250_000
    if n <= _ONE_WAVE:
        return n * k <= 32_000_000
    return m == 1 and n * k <= (32_000_000 if 1024 <= k < 2048 else 16_000_000)


@remembered
def config(problem: GemmProblem) -> Config:
    """The fastest of the same sweep, or nearly."""
    return replace(_shape(problem.n, problem.k // 128), tokens=8 if problem.m <= 8 else 16)


def _shape(n: int, blocks: int) -> Config:
    """A warp has one block of K or two, as far as there are blocks enough, and a GPU about one CTA of 16 warps, or
    two of 8, for each multiprocessor. Each further round of loads costs their latency anew."""
    if n > _ONE_WAVE and blocks >= 16:
        return Config(tiles=2)
    if n > 12_000:
        return Config(tiles=4, warps=4)
    if blocks <= 4 or n > _ONE_WAVE:
        return Config(tiles=2, warps=4, depth=1 if blocks <= 4 else 2)
    if blocks < 16:
        return Config(tiles=1 if n <= 2112 else 2, depth=1 if blocks <= 8 else 2)
    if n > 2112:
        return Config(tiles=2, warps=16)
    if blocks < 25:
        return Config(warps=16)
    if n > 1600:
        return Config(tiles=2, warps=16, cluster=2)
    if n > 1000:
        return Config(tiles=2, cluster=4)
    return Config(tiles=2, cluster=8) if blocks >= 48 else Config(depth=2, cluster=4)


def candidates(problem: GemmProblem) -> list[Config]:
    """The chosen configuration and one of every other kind; all are legal for every problem."""
    return every_kind(config(problem))


def every_kind(chosen: Config) -> list[Config]:
    kinds = [(1, 8, 1, 1), (1, 16, 1, 2), (1, 8, 2, 4), (2, 4, 2, 1), (2, 8, 1, 8), (2, 16, 1, 2), (4, 4, 1, 1)]
    others = (Config(*kind, tokens=chosen.tokens, row=chosen.row) for kind in kinds)
    return list(dict.fromkeys([chosen, *others]))


def source(
    config: Config, out_dtype: torch.dtype, bias: torch.dtype | None, int4: torch.dtype | None = None
) -> nvrtc.Source:
    """What is compiled for a configuration; int4: dtype of the scales of a weight in INT4."""
    macros = {key.upper(): value for key, value in asdict(config).items()} | {"AT_ONCE": config.at_once}
    macros |= {"OUTPUT": _FLOATS[out_dtype], "BIAS": 0 if bias is None else 1 + _FLOATS[bias]}
    macros |= {"INT4": int(int4 is not None), "SCALE": 0 if int4 is None else _FLOATS[int4]}
    headers = {"sm90.cuh": (_FOLDER.parent / "common/sm90.cuh").read_text()}
    return nvrtc.Source("gemm_fp8_few", (_FOLDER / "few.cu").read_text(), headers, macros)


@functools.cache
def _kernel(
    config: Config, out_dtype: torch.dtype, bias: torch.dtype | None, int4: torch.dtype | None
) -> driver.Kernel:
    return driver.Kernel(nvrtc.cubin(source(config, out_dtype, bias, int4)), "gemm_fp8_few")


def warmup(problems: Iterable[GemmProblem], *, workers: int = 8) -> int:
    """Compile what the problems need into the disk cache; returns how many kernels that are. Needs no GPU."""
    wanted = (source(config(p), p.out_dtype, p.bias) for p in problems if supports(p) is None)
    return nvrtc.compile_all(wanted, workers=workers)


@functools.cache
def _launch(config: Config, n: int, early: bool) -> driver.Launch:
    ctas = -(-n // (16 * config.tiles)) * config.cluster
    return driver.Launch(ctas, 32 * config.warps, config.cluster, 0, early)


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config,
    int4: bool = False,
) -> None:  # fmt: skip
    """out [M, N] = a @ b^T + bias; see `op.gemm_fp8_block` for the layouts, `gemm_fp8_row` where config.row, and
    `gemm_int4_fp8` where int4, with config.row where each token has one scale.

    Rows of a and b may be strided, by multiples of 16 bytes, rows of out by any number.
    """
    a, b = aligned(a), aligned(b)
    (m, k), prefetch = a.shape, settled(b) & settled(b_scale)
    n, b_stride = (b_scale.shape[0], b_scale.stride(1)) if int4 else (b.shape[0], b.stride(0))
    params = struct.pack(
        "<QQqqQQqQQqiiii", a.data_ptr(), b.data_ptr(), a.stride(0), b_stride, a_scale.data_ptr(), b_scale.data_ptr(),
        a_scale.stride(1), address(bias), out.data_ptr(), out.stride(0), m, n, k // 128, int(prefetch),
    )  # fmt: skip
    kernel = _kernel(config, out.dtype, None if bias is None else bias.dtype, b_scale.dtype if int4 else None)
    kernel.launch(_launch(config, n, prefetch), params, a.get_device())
