"""Benchmark cases of gemm_fp8_block: layers of real models from one token to a prefill."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case, bf16_peer, gemm_problems
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.gemm_fp8_block import op, reference
from quantlab_kernels.quantize_fp8 import op as quantizer


def _build(problem: GemmProblem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Quantized operands, and for the peers the same in bfloat16 and with one scale per row."""
    generator = torch.Generator(device).manual_seed(seed)
    x, w = (
        torch.randn(rows, problem.k, generator=generator, device=device, dtype=torch.bfloat16)
        for rows in (problem.m, problem.n)
    )
    rows = *quantizer.quantize_fp8_token(x), *quantizer.quantize_fp8_token(w)
    return *quantizer.quantize_fp8_group(x), *quantizer.quantize_fp8_block(w), x, w, rows


def _ours(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Any) -> Tensor:
    return op.gemm_fp8_block(a, a_scale, b, b_scale)


def _through(backend: str, problem: GemmProblem) -> Any:
    """The op by one backend, without dispatch."""
    module = op.BACKENDS.module(backend)

    def call(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Any) -> Tensor:
        out = a.new_empty((problem.m, problem.n), dtype=problem.out_dtype)
        module.launch(a, a_scale, b, b_scale, None, out, module.config(problem))
        return out

    return call


def _deep_gemm() -> Any:
    if importlib.util.find_spec("deep_gemm") is None:
        return "deep_gemm is not installed"
    from deep_gemm import fp8_gemm_nt

    def call(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Any) -> Tensor:
        out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
        fp8_gemm_nt((a, a_scale), (b, b_scale), out)
        return out

    return call


def _bf16(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, x: Tensor, w: Tensor, rows: Any) -> Tensor:
    return bf16_peer(x, w)


def _row_wise(fast: bool) -> Any:
    """cuBLASLt with one scale per row, which does less work; `fast` does not promote its sums at all."""

    def call(
        a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, x: Tensor, w: Tensor, rows: tuple[Tensor, ...]
    ) -> Tensor:
        codes, scale, w_codes, w_scale = rows
        return torch._scaled_mm(
            codes, w_codes.t(), scale_a=scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return call


def _reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Any) -> Tensor:
    return reference.gemm(a, a_scale, b, b_scale, None)


def cases() -> list[Case]:
    return [_case(name, problem) for name, problem in gemm_problems().items()]


def _case(name: str, problem: GemmProblem) -> Case:
    able = [b for b in op.BACKENDS.names if b != "eager" and not op.BACKENDS.reason(b, problem, question="able")]
    on_gpu = able if torch.cuda.is_available() else []
    groups = -(-problem.k // 128)
    return Case(
        name, problem, functools.partial(_build, problem), _ours, _reference, problem.flops,
        problem.bytes(4 * groups * (problem.m + -(-problem.n // 128))),
        backends={backend: _through(backend, problem) for backend in on_gpu},
        peers={
            "bf16 cuBLAS": _bf16,
            "DeepGEMM": _deep_gemm(),
            "row-wise": _row_wise(fast=False),
            "row-wise, fast accumulation": _row_wise(fast=True),
        },
    )  # fmt: skip
