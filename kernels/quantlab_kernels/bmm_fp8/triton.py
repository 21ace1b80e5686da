"""Triton backend: sm_80 and newer, 16-bit activations. Codes are widened to their type, which is exact.

A program multiplies the tokens of one head by a tile of its slice. A step takes as much of K as lies in one row and
column of scale blocks, and joins the float32 sum times its scale. `swap` multiplies the transposed problem: then the
codes are the operand that the matrix instruction takes from registers, and few tokens are its narrow side.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.bmm_fp8.op import Problem
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.triton_fp8 import decode_e4m3
from quantlab_kernels.common.triton_launch import Launcher, begin


@dataclass(frozen=True)
class Config:
    """Tile of the output, the most of K in a step, the pipeline, and whether the transposed problem is multiplied."""

    block_m: int
    block_n: int
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3
    swap: bool = False


def supports(problem: Problem) -> str | None:
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies 16-bit activations, these are {problem.dtype}"
    if step(problem) < 16:
        return f"needs heads whose rows and slices, and columns, in multiples of 16; this is {problem}"
    return None


def step(problem: Problem) -> int:
    """The longest power of two of K, at most 128, that never crosses a border of scale blocks."""
    along = (problem.k,) if problem.transposed else (problem.k, problem.rows, problem.first)
    return math.gcd(128, *along)


@remembered
def config(problem: Problem) -> Config:
    """Best of about thirty on an H200, with 16 and with 128 heads and 1, 16 and 128 tokens of DeepSeek's shapes. Not
    transposed there is a single step, which nothing can be fetched ahead of."""
    p = problem
    if p.m <= 16:
        return Config(16, 32, 128, 2, 4) if p.transposed else Config(16, 64, 128, 4, 1)
    if p.heads < 64:
        return Config(32, 64, 128, 4, 3, swap=True) if p.transposed else Config(64, 128, 128, 4, 1)
    if p.m <= 64:
        return Config(64, 64, 128, 4, 2) if p.transposed else Config(64, 128, 128, 4, 1)
    return Config(128, 64, 64, 4, 4) if p.transposed else Config(128, 128, 128, 8, 1, swap=True)


def launch(problem: Problem, a: Tensor, w: Tensor, w_scale: Tensor, out: Tensor, config: Config) -> None:
    """Fill out [M, H, N]; w and w_scale contiguous, of a only the last dimension."""
    p, c, native = problem, config, problem.sm >= 89
    grid = (triton.cdiv(p.n, c.block_n), p.heads, triton.cdiv(p.m, c.block_m))
    numbers = (p.m, p.heads, p.rows, p.columns, p.first, a.stride(0), a.stride(1), w_scale.stride(0))
    constants = p.n, p.k, p.transposed, c.block_m, c.block_n, min(c.block_k, step(p)), c.swap, native
    codes = w if native else w.view(torch.uint8)
    _launcher(c.num_stages)(grid, (a, codes, w_scale, out), numbers, constants, c.num_warps)


@functools.cache
def _launcher(num_stages: int) -> Launcher:
    return Launcher(_kernel, early=True, num_stages=num_stages)


@triton.jit
def _kernel(
    a_ptr, w_ptr, scale_ptr, out_ptr, m, heads, rows, columns, first, a_row, a_head, scale_row, N: tl.constexpr,
    K: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of one head. What lies past an edge wraps around; only the store is masked."""
    begin(EARLY)
    head = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row = head * rows + first  # the slice's first
    a_ptrs = a_ptr + (token % m).to(tl.int64)[:, None] * a_row + head * a_head + inner[None, :]
    if TRANSPOSED:
        w_ptrs = w_ptr + (row + column % N).to(tl.int64)[None, :] * columns + inner[:, None]
        scale_ptrs = scale_ptr + (row + column % N) // 128 * scale_row
    else:
        w_ptrs = w_ptr + (row + inner).to(tl.int64)[:, None] * columns + (column % N)[None, :]
        scale_ptrs = scale_ptr + column % N // 128
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        a = tl.load(a_ptrs + k)
        if TRANSPOSED:
            w = tl.load(w_ptrs + k)
            scale = tl.load(scale_ptrs + k // 128)
        else:
            w = tl.load(w_ptrs + k * columns)
            scale = tl.load(scale_ptrs + (row + k) // 128 * scale_row)
        if NATIVE:
            w = w.to(tl.float16)
        else:
            w = decode_e4m3(w)
        if a.dtype == tl.bfloat16:  # by way of float32: the direct conversion is a slow instruction for each
            w = w.to(tl.float32).to(tl.bfloat16)
        if SWAP:
            total += tl.dot(tl.trans(w), tl.trans(a)) * scale[:, None]
        else:
            total += tl.dot(a, w) * scale[None, :]
    if SWAP:
        total = tl.trans(total)
    out_ptrs = out_ptr + (token.to(tl.int64) * heads + head)[:, None] * N + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(token[:, None] < m) & (column[None, :] < N))
