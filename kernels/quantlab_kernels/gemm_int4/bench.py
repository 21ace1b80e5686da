"""Benchmark cases of gemm_int4: layers of real models from one token to a prefill."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case, bf16_peer, gemm_problems
from quantlab_kernels.common.int4 import Int4Problem, prepare_int4
from quantlab_kernels.gemm_int4 import op, reference
from quantlab_kernels.gemm_int4_fp8.bench import random_weight


def _build(problem: Int4Problem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Operands, and a weight in bfloat16 for the peer."""
    generator = torch.Generator(device).manual_seed(seed)
    words, b_scale = random_weight(problem.n, problem.k, device, generator)
    x, w = (
        torch.randn(rows, problem.k, generator=generator, device=device, dtype=torch.bfloat16)
        for rows in (problem.m, problem.n)
    )
    return x, prepare_int4(words, activation_bits=16), b_scale, w


def _ours(x: Tensor, b: Tensor, b_scale: Tensor, w: Tensor) -> Tensor:
    return op.gemm_int4(x, b, b_scale)


def _bf16(x: Tensor, b: Tensor, b_scale: Tensor, w: Tensor) -> Tensor:
    return bf16_peer(x, w)


def _reference(x: Tensor, b: Tensor, b_scale: Tensor, w: Tensor) -> Tensor:
    return reference.gemm(x, b, b_scale, None)


def cases() -> list[Case]:
    shapes = gemm_problems().items()
    return [_case(name, Int4Problem(g.m, g.n, g.k, torch.bfloat16, sm=g.sm)) for name, g in shapes]


def _case(name: str, problem: Int4Problem) -> Case:
    return Case(
        name, problem, functools.partial(_build, problem), _ours, _reference, problem.flops, problem.bytes,
        peers={"bf16 cuBLAS": _bf16}, wide=True,
    )  # fmt: skip
