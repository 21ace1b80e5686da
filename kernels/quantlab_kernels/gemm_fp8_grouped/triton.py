"""Triton backend: sm_80 and newer, both kinds of scales. A program looks its expert up in the counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.triton_fp8 import decode_e4m3
from quantlab_kernels.gemm_fp8_grouped import reference
from quantlab_kernels.gemm_fp8_grouped.op import GroupedProblem


@dataclass(frozen=True)
class Config:
    """Tile of the output and depth of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3


def supports(problem: GroupedProblem) -> str | None:
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if problem.k % 128:
        return f"K = {problem.k} is not a multiple of 128; pad the weight"
    return None


def config(problem: GroupedProblem) -> Config:
    """Tiles as tall as an expert has rows on average, within what is a shape of the matrix instruction."""
    block_m = 16 if problem.mean <= 12 else 32 if problem.mean <= 32 else 64
    return Config(block_m, 128 if problem.mean > 64 else 64, num_stages=4 if problem.sm >= 90 else 2)


def launch(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor, config: Config) -> None:
    """out [S, N]; operands contiguous, a_scale with any strides."""
    native = gpu_of(out).sm >= 89
    blocked = not reference.row_wise(a_scale, b, b_scale)
    (rows, k), (experts, n, _) = a.shape, b.shape
    if not native:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    tiles = rows // config.block_m + min(experts, rows)
    _grouped_kernel[(tiles * triton.cdiv(n, config.block_n),)](
        a, a_scale, b, b_scale, counts, out, rows, n, k, experts, a_scale.stride(0),
        a_scale.stride(1) if blocked else 0, b_scale.stride(0), b_scale.stride(1), BLOCKED=blocked,
        EXPERTS=triton.next_power_of_2(experts), BLOCK_M=config.block_m, BLOCK_N=config.block_n, NATIVE=native,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _grouped_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, counts_ptr, out_ptr, rows, n, k, experts, a_scale_row, a_scale_group,
    b_scale_expert, b_scale_row, BLOCKED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of one expert. Programs behind the last tile have nothing to do."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    each = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + each, mask=each < experts, other=0).to(tl.int32)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    if expert >= experts:
        return
    before = each < expert
    within = tile - tl.sum(tl.where(before, tiles, 0), 0)
    start = tl.sum(tl.where(before, counts, 0), 0)
    end = start + tl.sum(tl.where(each == expert, counts, 0), 0)

    row = start + within * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_row, b_row = tl.minimum(row, rows - 1), column % n
    inner = tl.arange(0, 128)
    a_ptrs = a_ptr + a_row.to(tl.int64)[:, None] * k + inner[None, :]
    b_ptrs = b_ptr + (expert.to(tl.int64) * n + b_row)[:, None] * k + inner[None, :]
    a_scale_ptrs = a_scale_ptr + a_row * a_scale_row
    b_scale_ptr += expert.to(tl.int64) * b_scale_expert
    b_scale_ptrs = b_scale_ptr + tile_n * BLOCK_N // 128 * b_scale_row
    if not BLOCKED:
        a_scale = tl.load(a_scale_ptrs)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(k // 128):
        a = tl.load(a_ptrs)
        b = tl.load(b_ptrs)
        if not NATIVE:
            a = decode_e4m3(a)
            b = decode_e4m3(b)
        if BLOCKED:
            a_scale = tl.load(a_scale_ptrs) * tl.load(b_scale_ptrs)
            a_scale_ptrs += a_scale_group
            b_scale_ptrs += 1
        total += tl.dot(a, tl.trans(b)) * a_scale[:, None]  # the promotion: see common/triton_gemm.py
        a_ptrs += 128
        b_ptrs += 128
    if not BLOCKED:
        total *= tl.load(b_scale_ptr + b_row * b_scale_row)[None, :]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < end) & (column[None, :] < n))
