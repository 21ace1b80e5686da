"""The Triton main loop of both INT4 rooms: ``out = (a_scale * a) @ (b_scale * codes).T + bias`` with b in words.

Each step takes a group: 16 words of a row become 128 codes in the dtype of the activations, in which every code is
exact, and the product is added, times the scales, to a float32 sum in registers. Tiles, the split of K and the ragged
edges are those of `triton_gemm`; the portable layout is that of checkpoints, since other GPUs' fragments differ and the
compiler moves codes to where its MMA wants them anyway.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.gemm_configs import Config, choose
from quantlab_kernels.common.int4 import Int4Problem
from quantlab_kernels.common.triton_fp8 import decode_e4m3
from quantlab_kernels.common.triton_gemm import _sum_kernel, _tile_of


def supports(problem: Int4Problem) -> str | None:
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if problem.tiles:
        return "takes a weight in words, this one is in tiles for Hopper"
    if problem.x == torch.float32:
        return "takes activations of 8 or 16 bits, these are float32"
    return None


def config(room: str, problem: Int4Problem) -> Config:
    """Tuned, else the FP8 rooms' heuristic with a shorter pipeline: 16-bit activations take twice the memory."""
    gemm = GemmProblem(problem.m, problem.n, problem.k, problem.out_dtype, problem.bias, problem.sm)
    chosen = choose(room, gemm)
    return replace(chosen, num_stages=min(chosen.num_stages, 3), swap=False)


def launch(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config, *,
    native: bool,
) -> None:  # fmt: skip
    """Fill out [M, N]. a_scale [M, 1] or [M, K/128] may have any strides, None without; b_scale [N, K/128] too.

    native  use the GPU's FP8 instructions for E4M3 activations; otherwise multiply float16, into which all codes fit
    """
    (m, k), n = a.shape, b_scale.shape[0]
    split = config.split_k
    fp8 = a.dtype == torch.float8_e4m3fn
    if fp8 and not native:
        a = a.view(torch.uint8)
    target = out if split == 1 else out.new_empty((split, m, n), dtype=torch.float32)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), split)
    fused_bias = bias if split == 1 else None
    scales = a if a_scale is None else a_scale
    row, group = (0, 0) if a_scale is None else (a_scale.stride(0), a_scale.stride(1) if a_scale.shape[1] > 1 else 0)
    _int4_kernel[grid](
        a, scales, b, b_scale, target if fused_bias is None else fused_bias, target, m, n, k, row, group,
        b_scale.stride(0), b_scale.stride(1), SCALED=a_scale is not None, DECODE=fp8 and not native,
        HAS_BIAS=fused_bias is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if split > 1:
        block = 1024
        _sum_kernel[(triton.cdiv(m * n, block),)](
            target, out if bias is None else bias, out, m * n, n, split, HAS_BIAS=bias is not None, BLOCK=block,
            enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _int4_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, bias_ptr, out_ptr, m, n, k, a_scale_row, a_scale_group, b_scale_row,
    b_scale_group, SCALED: tl.constexpr, DECODE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of the result, or of the partial sum number ``program_id(1)`` of it."""
    tile_m, tile_n = _tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_row, b_row = row % m, column % n
    steps = tl.cdiv(k // 128, tl.num_programs(1))
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, k // 128)
    a_ptrs = a_ptr + a_row.to(tl.int64)[:, None] * k + first * 128 + tl.arange(0, 128)[None, :]
    b_ptrs = b_ptr + b_row.to(tl.int64)[:, None] * (k // 8) + first * 16 + tl.arange(0, 16)[None, :]
    a_scale_ptrs = a_scale_ptr + a_row * a_scale_row + first * a_scale_group
    b_scale_ptrs = b_scale_ptr + b_row * b_scale_row + first * b_scale_group
    shifts = tl.arange(0, 8) * 4
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, last):
        a = tl.load(a_ptrs)
        if DECODE:
            a = decode_e4m3(a)
        words = tl.load(b_ptrs)
        codes = ((words[:, :, None] >> shifts[None, None, :]) & 15) - 8
        b = tl.reshape(codes, (BLOCK_N, 128)).to(tl.float32).to(a.dtype)
        part = tl.dot(a, tl.trans(b))
        if SCALED:
            part *= tl.load(a_scale_ptrs)[:, None]
        total += part * tl.load(b_scale_ptrs).to(tl.float32)[None, :]
        a_ptrs += 128
        b_ptrs += 16
        a_scale_ptrs += a_scale_group
        b_scale_ptrs += b_scale_group
    if HAS_BIAS:
        total += tl.load(bias_ptr + b_row).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (tl.program_id(1).to(tl.int64) * m + row[:, None]) * n + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < m) & (column[None, :] < n))
