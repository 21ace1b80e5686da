"""The Triton main loop of both FP8 GEMM rooms: ``out = (a_scale * a) @ (b_scale * b).T + bias``.

Each step multiplies 128 of K in the tensor core and adds the product, times its scales, to a float32 sum in registers.
That multiplication is the promotion: written as a plain ``acc += dot`` the compiler would fold the sum back into the
tensor core, whose FP8 accumulator keeps 14 bits.

Few tokens leave a row of tiles too short for the GPU, in two ways that have a remedy each: `split_k` gives every tile
to several programs (their float32 partial sums go through memory and are added in a fixed order, so results repeat bit
for bit), and `swap` multiplies the transposed problem, so that the few tokens are the narrow side of the instruction.
Rows and columns past the edge wrap around to valid memory instead of being masked; only the store is masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.gemm_configs import Config
from quantlab_kernels.common.triton_fp8 import decode_e4m3


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config, *,
    blocked: bool, native: bool,
) -> None:  # fmt: skip
    """Fill out [M, N]. All operands as in the rooms, contiguous; a_scale may have any strides.

    blocked  scales as in `gemm_fp8_block` (per 128 of K); otherwise as in `gemm_fp8_row` (per row)
    native   use the GPU's FP8 instructions; otherwise multiply float16, into which every code fits exactly
    """
    (m, k), n = a.shape, b.shape[0]
    split = config.split_k
    if not native:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    target = out if split == 1 else out.new_empty((split, m, n), dtype=torch.float32)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), split)
    fused_bias = bias if split == 1 else None
    _gemm_kernel[grid](
        a, a_scale, b, b_scale, target if fused_bias is None else fused_bias, target, m, n, k,
        a_scale.stride(0), a_scale.stride(1) if blocked else 0, b_scale.stride(0), BLOCKED=blocked,
        HAS_BIAS=fused_bias is not None, SWAP=config.swap,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP_M=config.group_m, NATIVE=native,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if split > 1:
        block = 1024
        _sum_kernel[(triton.cdiv(m * n, block),)](
            target, out if bias is None else bias, out, m * n, n, split, HAS_BIAS=bias is not None, BLOCK=block,
            enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _tile_of(pid, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile_m, tile_n), walking GROUP_M tiles along M before the next along N."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    width = GROUP_M * tl.cdiv(n, BLOCK_N)
    first = (pid // width) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit
def _gemm_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, bias_ptr, out_ptr, m, n, k, a_scale_row, a_scale_group, b_scale_row,
    BLOCKED: tl.constexpr, HAS_BIAS: tl.constexpr, SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of the result, or of the partial sum number ``program_id(1)`` of it."""
    tile_m, tile_n = _tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_row, b_row = row % m, column % n
    inner = tl.arange(0, 128)
    steps = tl.cdiv(k // 128, tl.num_programs(1))
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, k // 128)
    a_ptrs = a_ptr + a_row.to(tl.int64)[:, None] * k + first * 128 + inner[None, :]
    b_ptrs = b_ptr + b_row.to(tl.int64)[:, None] * k + first * 128 + inner[None, :]
    a_scale_ptrs = a_scale_ptr + a_row * a_scale_row + first * a_scale_group
    if BLOCK_N <= 128:  # the whole tile lies in one row of weight blocks
        b_scale_ptrs = b_scale_ptr + tile_n * BLOCK_N // 128 * b_scale_row + first
    else:
        b_scale_ptrs = b_scale_ptr + b_row // 128 * b_scale_row + first
    if not BLOCKED:
        a_scale = tl.load(a_scale_ptrs)
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, last):
        a = tl.load(a_ptrs)
        b = tl.load(b_ptrs)
        if not NATIVE:
            a = decode_e4m3(a)
            b = decode_e4m3(b)
        if BLOCKED:
            a_scale = tl.load(a_scale_ptrs)
            b_scale = tl.load(b_scale_ptrs)
            a_scale_ptrs += a_scale_group
            b_scale_ptrs += 1
        if SWAP:
            scale = a_scale[None, :]
            if BLOCKED:
                if BLOCK_N <= 128:
                    scale = scale * b_scale
                else:
                    scale = scale * b_scale[:, None]
            total += tl.dot(b, tl.trans(a)) * scale
        else:
            scale = a_scale[:, None]
            if BLOCKED:
                if BLOCK_N <= 128:
                    scale = scale * b_scale
                else:
                    scale = scale * b_scale[None, :]
            total += tl.dot(a, tl.trans(b)) * scale
        a_ptrs += 128
        b_ptrs += 128
    if SWAP:
        total = tl.trans(total)
    if not BLOCKED:
        total *= tl.load(b_scale_ptr + b_row * b_scale_row)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + b_row).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (tl.program_id(1).to(tl.int64) * m + row[:, None]) * n + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < m) & (column[None, :] < n))


@triton.jit
def _sum_kernel(partial_ptr, bias_ptr, out_ptr, size, n, split, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum of the `split` partial sums, in their order, + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(partial_ptr + at, mask=mask, other=0.0)
    part = at
    for _ in range(1, split):
        part += size
        total += tl.load(partial_ptr + part, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
