"""Benchmark cases of gemm_fp8_row: layers of real models from one token to a prefill."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case, bf16_peer, gemm_problems
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.gemm_fp8_row import op, reference
from quantlab_kernels.quantize_fp8 import op as quantizer


def _build(problem: GemmProblem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Quantized operands, and the same in bfloat16 for the peer."""
    generator = torch.Generator(device).manual_seed(seed)
    x, w = (
        torch.randn(rows, problem.k, generator=generator, device=device, dtype=torch.bfloat16)
        for rows in (problem.m, problem.n)
    )
    return *quantizer.quantize_fp8_token(x), *quantizer.quantize_fp8_token(w), x, w


def _ours(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return op.gemm_fp8_row(a, a_scale, b, b_scale)


def _through(backend: str, problem: GemmProblem) -> Any:
    """The op by one backend, without dispatch."""
    module = op.BACKENDS.module(backend)

    def call(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, x: Tensor, w: Tensor) -> Tensor:
        out = a.new_empty((problem.m, problem.n), dtype=problem.out_dtype)
        module.launch(a, a_scale, b, b_scale, None, out, module.config(problem))
        return out

    return call


def _fast_accumulation(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """What others call row-wise FP8: never promoted, so it bounds the speed and not the error."""
    return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


def _reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return reference.gemm(a, a_scale, b, b_scale, None)


def cases() -> list[Case]:
    return [_case(name, problem) for name, problem in gemm_problems().items()]


def _case(name: str, problem: GemmProblem) -> Case:
    able = [b for b in op.BACKENDS.names if b != "eager" and not op.BACKENDS.reason(b, problem, question="able")]
    on_gpu = able if torch.cuda.is_available() else []
    return Case(
        name, problem, functools.partial(_build, problem), _ours, _reference, problem.flops,
        problem.bytes(4 * (problem.m + problem.n)),
        backends={backend: _through(backend, problem) for backend in on_gpu},
        peers={"bf16 cuBLAS": lambda a, sa, b, sb, x, w: bf16_peer(x, w), "unpromoted": _fast_accumulation},
    )  # fmt: skip
