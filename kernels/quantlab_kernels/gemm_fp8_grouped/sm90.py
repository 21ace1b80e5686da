"""Hopper backend: the kernel of `gemm_fp8_block` built with GROUPED, which finds each tile's expert by itself."""

from __future__ import annotations

import struct
from dataclasses import replace

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm import round_up
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.launches import aligned
from quantlab_kernels.gemm_fp8_block import sm90
from quantlab_kernels.gemm_fp8_block.sm90 import NO_MAP, PARAMS_BYTES
from quantlab_kernels.gemm_fp8_block.sm90_configs import MAX_EXPERTS, Config, deepest, unrolled
from quantlab_kernels.gemm_fp8_grouped.op import GroupedProblem

# Of 512 rows an expert: so many that it does not matter that the last wave of tall tiles is not full.
_MANY_TILES = 2000


def supports(problem: GroupedProblem) -> str | None:
    if problem.sm != 90:
        return f"Hopper's instructions exist on sm_90 only, the GPU is sm_{problem.sm}"
    if problem.k % 128:
        return f"needs K in multiples of 128, this is K = {problem.k}"
    if problem.experts > MAX_EXPERTS:
        return f"finds the rows of {MAX_EXPERTS} experts at most, these are {problem.experts}"
    return nvrtc.missing()


@remembered
def config(problem: GroupedProblem) -> Config:
    """Tiles as tall as an expert has rows; with few, the weights go on the M side of the MMA as in `gemm_fp8_block`."""
    return replace(_tiles(problem), row=int(not problem.blocked))


def _tiles(problem: GroupedProblem) -> Config:
    if problem.mean <= 64:
        by = next((b for b in (16, 32) if 1.25 * problem.mean <= b), 64)
        return deepest(Config(by=by, math_groups=2, swap=1, output_tma=0, grouped=1))
    tma = int(problem.out_dtype.itemsize == 2 and problem.n % 8 == 0)
    if not tma:
        return deepest(Config(temps=2, output_tma=0, grouped=1), most=6)
    tall = Config(math_groups=3, stages=4, pieces=2, group=11, grouped=1)
    rings = unrolled(replace(tall, group=16, rotate=1), problem.k)
    many = problem.rows * problem.n >= _MANY_TILES * tall.bx * tall.by
    if problem.blocked and rings.unroll and (problem.mean >= 1024 or (problem.mean >= 512 and many)):
        return rings
    return tall if problem.mean >= 1024 else deepest(Config(temps=2, grouped=1), most=6)


def launch(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor, config: Config) -> None:
    """out [S, N]; all operands contiguous, a_scale in the layout of activation scales, or [S, 1]."""
    if (a.data_ptr() | a_scale.data_ptr() | b.data_ptr()) % 16:
        a, a_scale, b = (aligned(operand) for operand in (a, a_scale, b))
    device = a.get_device()
    code, shape, params = _prepared(
        config, out.dtype, device, (*a.shape, *b.shape[:2]), a.data_ptr(), (a_scale.data_ptr(), a_scale.stride(1)),
        b.data_ptr(), b_scale.data_ptr(), counts.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    code.launch(shape, params, device)


@remembered
def _prepared(
    config: Config, out_dtype: torch.dtype, device: int, extents: tuple[int, int, int, int], a: int,
    a_scale: tuple[int, int], b: int, b_scale: int, counts: int, out: int,
) -> tuple[driver.Kernel, driver.Launch, bytes]:  # fmt: skip
    """Kernel, shape of the launch and the kernel's `Params`, for addresses of the operands."""
    rows, k, experts, n = extents
    x, y = (b, experts * n), (a, rows)
    if not config.swap:
        x, y = y, x
    maps = [
        driver.tensor_map(driver.UINT8, pointer, k, count, k, 128, box, driver.SWIZZLE_128)
        for (pointer, count), box in ((x, config.bx), (y, config.by))
    ]
    tokens = config.by if config.swap else config.bx
    column = round_up(4 * max(a_scale[1], 4), 16)  # a single column of scales may report any stride
    scales = driver.FLOAT32, a_scale[0], rows, k // 128, column, tokens + 4, 1, driver.NO_SWIZZLE
    maps.append(NO_MAP if config.row else driver.tensor_map(*scales))
    maps.append(sm90.output_map(config, (rows, n), (out, n), out_dtype) if config.output_tma else NO_MAP)
    scalars = struct.pack("<QQQqQQiiii", b_scale, 0, out, n, 0, 0, rows, n, k // 128, 0)
    scalars += struct.pack("<Q", a_scale[0]) if config.row else b""
    params = (b"".join(maps) + scalars + struct.pack("<Qi", counts, experts)).ljust(PARAMS_BYTES, b"\0")
    channels = config.bx if config.swap else config.by
    tiles = (rows // tokens + min(experts, rows)) * -(-n // channels)
    shape = driver.Launch(
        min(tiles, gpu(device).sm_count), 128 * (config.math_groups + 1), 1, config.shared_bytes(), early=True
    )
    return sm90.kernel(config, out_dtype, None, False), shape, params
