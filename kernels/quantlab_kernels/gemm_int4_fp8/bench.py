"""Benchmark cases of gemm_int4_fp8: layers of real models from one token to a prefill."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case, bf16_peer, gemm_problems
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.int4 import Int4Problem, prepare_int4
from quantlab_kernels.gemm_fp8_block.op import gemm_fp8_block
from quantlab_kernels.gemm_int4_fp8 import op, reference
from quantlab_kernels.packing import pack_int4
from quantlab_kernels.quantize_fp8 import op as quantizer


def random_weight(n: int, k: int, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words and scales of a weight."""
    codes = torch.randint(-7, 8, (n, k), dtype=torch.int8, device=device, generator=generator)
    scale = torch.rand(n, k // 128, device=device, generator=generator) + 0.5
    return pack_int4(codes), as_group_scale(scale.to(torch.bfloat16))


def _build(problem: Int4Problem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Operands, and for the peers a weight in E4M3 blocks and one in bfloat16 with its activations."""
    generator = torch.Generator(device).manual_seed(seed)
    words, b_scale = random_weight(problem.n, problem.k, device, generator)
    x, w = (
        torch.randn(rows, problem.k, generator=generator, device=device, dtype=torch.bfloat16)
        for rows in (problem.m, problem.n)
    )
    b = prepare_int4(words, activation_bits=8)
    fp8 = *quantizer.quantize_fp8_group(x), *quantizer.quantize_fp8_block(w)
    return *quantizer.quantize_fp8_token(x), b, b_scale, fp8, x, w


def _ours(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Any) -> Tensor:
    return op.gemm_int4_fp8(a, a_scale, b, b_scale)


def _fp8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, fp8: Any, x: Tensor, w: Tensor) -> Tensor:
    return gemm_fp8_block(*fp8)


def _bf16(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, fp8: Any, x: Tensor, w: Tensor) -> Tensor:
    return bf16_peer(x, w)


def _reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Any) -> Tensor:
    return reference.gemm(a, a_scale, b, b_scale, None)


def cases() -> list[Case]:
    return [_case(name, Int4Problem(g.m, g.n, g.k, sm=g.sm)) for name, g in gemm_problems().items()]


def _case(name: str, problem: Int4Problem) -> Case:
    return Case(
        name, problem, functools.partial(_build, problem), _ours, _reference, problem.flops, problem.bytes,
        peers={"our FP8 block": _fp8, "bf16 cuBLAS": _bf16},
    )  # fmt: skip
