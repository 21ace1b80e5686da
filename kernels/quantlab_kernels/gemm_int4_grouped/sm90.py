"""Hopper backend: the kernel of `gemm_int4_fp8` built with EXPERTS, which finds each tile's expert by itself."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from torch import Tensor

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.int4 import GROUP, Int4Problem
from quantlab_kernels.common.launches import aligned
from quantlab_kernels.gemm_fp8_block.sm90_configs import MAX_EXPERTS
from quantlab_kernels.gemm_int4_fp8 import sm90
from quantlab_kernels.gemm_int4_fp8.sm90_configs import Config, deepest, reject


def supports(problem: Int4Problem) -> str | None:
    if problem.experts > MAX_EXPERTS:
        return f"finds the rows of {MAX_EXPERTS} experts at most, these are {problem.experts}"
    return sm90.supports(problem)


@remembered
def config(problem: Int4Problem) -> Config:
    """Tiles as wide as an expert has rows, with room for some that have a few more."""
    mean = problem.m / problem.experts
    if mean > 64:
        wide, narrower = (Config(groups, 1, 128, prefetch=0, stream=0) for groups in (3, 2))
        return deepest(wide if reject(deepest(wide, problem), problem) is None else narrower, problem)
    by = 16 if mean <= 12 else 32 if mean <= 32 else 64
    if by < 64 and problem.k > 2048:
        return deepest(Config(2, 2, by, prefetch=0, stream=0), problem)
    return deepest(Config(4, 1, by, prefetch=0, stream=0, early=int(by < 64)), problem)


def warmup(problems: Iterable[Int4Problem]) -> int:
    """As `gemm_int4_fp8.sm90.warmup`."""
    return nvrtc.compile_all(sm90.source(config(p), p) for p in problems if supports(p) is None)


def launch(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor, config: Config
) -> None:
    """out [S, N]; a, counts and out contiguous, b in tiles, the scales in the layout of activation scales."""
    if (a.data_ptr() | b.data_ptr() | b_scale.data_ptr()) % 16 or (a_scale is not None and a_scale.data_ptr() % 16):
        a, b, b_scale = aligned(a), aligned(b), aligned(b_scale)
        a_scale = None if a_scale is None else aligned(a_scale)
    device = a.get_device()
    experts, n, _ = b_scale.shape
    grouped = a_scale is not None and a_scale.shape[1] > 1
    problem = Int4Problem(a.shape[0], n, a.shape[1], a.dtype, out.dtype, None, b_scale.dtype, grouped, experts=experts)
    token_scale = 0 if a_scale is None else a_scale.data_ptr()
    code, shape, params = _prepared(
        config, problem, device, a.data_ptr(), token_scale, b.data_ptr(), b_scale.data_ptr(), counts.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    code.launch(shape, params, device)


@remembered
def _prepared(
    config: Config, problem: Int4Problem, device: int, x: int, token_scale: int, b: int, scale: int, counts: int,
    out: int,
) -> tuple[driver.Kernel, driver.Launch, bytes]:  # fmt: skip
    """Kernel, shape of the launch and the kernel's `Params`, for addresses of the operands."""
    rows, n, blocks, experts = problem.m, problem.n, problem.k // GROUP, problem.experts
    maps = sm90.operand_maps(config, problem, (x, problem.k), token_scale, scale)
    scalars = struct.pack(
        "<QQQQqQQiiiiiii4xQi", b, token_scale, 0, out, n, 0, 0, rows, n, blocks, 0, 0, 0, 0, counts, experts
    )
    params = b"".join(maps) + bytes(128) + scalars
    tiles = (rows // config.by + min(experts, rows)) * -(-n // config.bx)
    shape = driver.Launch(min(tiles, gpu(device).sm_count), config.threads, 1, config.shared_bytes(problem), early=True)
    return sm90.kernel(config, sm90.kind(problem)), shape, params + bytes(-len(params) % 64)
