"""Triton backend: sm_80 and newer, weights in words. A program looks its expert up in the counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.int4 import Int4Problem
from quantlab_kernels.common.triton_fp8 import decode_e4m3
from quantlab_kernels.common.triton_int4 import supports

__all__ = ["Config", "config", "launch", "supports"]


@dataclass(frozen=True)
class Config:
    """Tile of the output and depth of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3


def config(problem: Int4Problem) -> Config:
    """Tiles as tall as an expert has rows on average, within what is a shape of the matrix instruction."""
    mean = problem.m / problem.experts
    block_m = 16 if mean <= 12 else 32 if mean <= 32 else 64
    return Config(block_m, 128 if mean > 64 else 64, num_stages=3 if problem.sm >= 90 else 2)


def launch(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor, config: Config
) -> None:
    """out [S, N]; a, b words [E, N, K/8] and out contiguous, the scales with any strides."""
    (rows, k), (experts, n, _) = a.shape, b_scale.shape
    fp8 = a.dtype == torch.float8_e4m3fn
    decode = fp8 and gpu_of(out).sm < 89
    if decode:
        a = a.view(torch.uint8)
    scales = a if a_scale is None else a_scale
    row, group = (0, 0) if a_scale is None else (a_scale.stride(0), a_scale.stride(1) if a_scale.shape[1] > 1 else 0)
    tiles = rows // config.block_m + min(experts, rows)
    _grouped_kernel[(tiles * triton.cdiv(n, config.block_n),)](
        a, scales, b, b_scale, counts, out, rows, n, k, experts, row, group, b_scale.stride(0), b_scale.stride(1),
        b_scale.stride(2), SCALED=a_scale is not None, DECODE=decode, EXPERTS=triton.next_power_of_2(experts),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _grouped_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, counts_ptr, out_ptr, rows, n, k, experts, a_scale_row, a_scale_group,
    b_scale_expert, b_scale_row, b_scale_group, SCALED: tl.constexpr, DECODE: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of one expert. Programs behind the last tile have nothing to do."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    each = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + each, mask=each < experts, other=0).to(tl.int32)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if expert >= experts:
        return
    before = each < expert
    within = tile - tl.sum(tl.where(before, tiles, 0), 0)
    start = tl.sum(tl.where(before, counts, 0), 0)
    end = start + tl.sum(tl.where(each == expert, counts, 0), 0)

    row = start + within * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_row, b_row = tl.minimum(row, rows - 1), column % n
    a_ptrs = a_ptr + a_row.to(tl.int64)[:, None] * k + tl.arange(0, 128)[None, :]
    b_ptrs = b_ptr + (expert.to(tl.int64) * n + b_row)[:, None] * (k // 8) + tl.arange(0, 16)[None, :]
    a_scale_ptrs = a_scale_ptr + a_row * a_scale_row
    b_scale_ptrs = b_scale_ptr + expert.to(tl.int64) * b_scale_expert + b_row * b_scale_row
    shifts = tl.arange(0, 8) * 4
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(k // 128):
        a = tl.load(a_ptrs)
        if DECODE:
            a = decode_e4m3(a)
        words = tl.load(b_ptrs)
        codes = ((words[:, :, None] >> shifts[None, None, :]) & 15) - 8
        b = tl.reshape(codes, (BLOCK_N, 128)).to(tl.float32).to(a.dtype)
        part = tl.dot(a, tl.trans(b))
        if SCALED:
            part *= tl.load(a_scale_ptrs)[:, None]
        total += part * tl.load(b_scale_ptrs).to(tl.float32)[None, :]  # the promotion: see common/triton_gemm.py
        a_ptrs += 128
        b_ptrs += 16
        a_scale_ptrs += a_scale_group
        b_scale_ptrs += b_scale_group
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < end) & (column[None, :] < n))
