"""Benchmark cases of bmm_fp8: both products of absorbed latent attention, in models of 16 and of 128 heads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels.bmm_fp8 import op, reference
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.quantize_fp8 import op as quantizer

MODELS = {"deepseek-v2-lite": 16, "deepseek-v3": 128}  # heads
NOPE, V, LATENT = 128, 128, 512
TOKENS = (1, 16, 64, 128)


def build(problem: op.Problem, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Activations, the projection, and each head's matrix [H, K, N] in 16 bits for the peer."""
    p, generator = problem, torch.Generator(device).manual_seed(seed)
    w = torch.randn(p.heads * p.rows, p.columns, generator=generator, device=device, dtype=torch.bfloat16)
    codes, scale = quantizer.quantize_fp8_block(w)
    a = torch.randn(p.m, p.heads, p.k, generator=generator, device=device, dtype=p.dtype)
    matrix = w.unflatten(0, (p.heads, -1))[:, p.first : p.first + p.count]
    return a, codes, scale, (matrix.transpose(1, 2) if p.transposed else matrix).contiguous()


def _ours(problem: op.Problem, a: Tensor, codes: Tensor, scale: Tensor, matrix: Tensor) -> Tensor:
    p = problem
    return op.bmm_fp8(a, codes, scale, first=p.first, count=p.count, transposed=p.transposed)


def _reference(problem: op.Problem, a: Tensor, codes: Tensor, scale: Tensor, matrix: Tensor) -> Tensor:
    return reference.bmm(a, codes, scale, problem.first, problem.count, problem.transposed)


def _bmm(a: Tensor, codes: Tensor, scale: Tensor, matrix: Tensor) -> Tensor:
    """cuBLAS on 16-bit matrices, which are twice as large."""
    return a.transpose(0, 1) @ matrix


def cases() -> list[Case]:
    return [
        _case(f"{name} {'values' if transposed else 'keys'} M={m}", m, heads, transposed)
        for name, heads in MODELS.items() for transposed in (False, True) for m in TOKENS
    ]  # fmt: skip


def _case(name: str, m: int, heads: int, transposed: bool) -> Case:
    first, count = (NOPE, V) if transposed else (0, NOPE)
    problem = op.Problem(m, heads, NOPE + V, LATENT, first, count, transposed, sm=present_sm())
    return Case(
        name, problem, functools.partial(build, problem), functools.partial(_ours, problem),
        functools.partial(_reference, problem), problem.flops, problem.bytes, peers={"bf16 torch.bmm": _bmm}, wide=True,
    )  # fmt: skip
