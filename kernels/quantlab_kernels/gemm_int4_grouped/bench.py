"""Benchmark cases of gemm_int4_grouped: the experts of `gemm_fp8_grouped`'s, with E4M3 activations."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.int4 import Int4Problem, prepare_int4
from quantlab_kernels.gemm_fp8_grouped.bench import GROUPS, LAYERS
from quantlab_kernels.gemm_fp8_grouped.op import gemm_fp8_grouped
from quantlab_kernels.gemm_int4_fp8.bench import random_weight
from quantlab_kernels.gemm_int4_grouped import op, reference
from quantlab_kernels.quantize_fp8 import op as quantizer


def _build(problem: Int4Problem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Operands with even counts; for the peers the words of the weight, and one in E4M3 blocks."""
    generator = torch.Generator(device).manual_seed(seed)
    experts, n = problem.experts, problem.n
    words, b_scale = random_weight(experts * n, problem.k, device, generator)
    options: Any = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    a, a_scale = quantizer.quantize_fp8_group(torch.randn(problem.m, problem.k, **options))
    w, w_scale = quantizer.quantize_fp8_block(torch.randn(experts * n, problem.k, **options))
    counts = torch.full((experts,), problem.m // experts, device=device)
    b = prepare_int4(words, activation_bits=8).unflatten(0, (experts, -1))
    fp8 = w.view(experts, n, -1), w_scale.view(experts, -1, w_scale.shape[1])
    return a, a_scale, b, b_scale.unflatten(0, (experts, n)), counts, words.unflatten(0, (experts, n)), fp8


def _ours(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
    return op.gemm_int4_grouped(a, a_scale, b, b_scale, counts)


def _fp8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, words: Tensor, fp8: Any) -> Tensor:
    return gemm_fp8_grouped(a, a_scale, fp8[0], fp8[1], counts)


def _triton(problem: Int4Problem) -> Any:
    portable = op.BACKENDS.module("triton")

    def call(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, words: Tensor, fp8: Any) -> Tensor:
        out = a.new_empty((problem.m, problem.n), dtype=problem.out_dtype)
        portable.launch(a, a_scale, words, b_scale, counts, out, portable.config(problem))
        return out

    return call


def _reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
    return reference.gemm(a, a_scale, b, b_scale, counts)


def cases() -> list[Case]:
    sm = present_sm()

    def problem(experts: int, rows: int, n: int, k: int) -> Int4Problem:
        return Int4Problem(experts * rows, n, k, grouped=True, sm=sm, experts=experts)

    return [
        _case(f"{experts}x{rows} {model}.{layer}", problem(experts, rows, n, k))
        for model, layers in LAYERS.items()
        for experts, rows in GROUPS[model]
        for layer, (n, k) in layers.items()
    ]


def _case(name: str, problem: Int4Problem) -> Case:
    return Case(
        name, problem, functools.partial(_build, problem), _ours, _reference, problem.flops, problem.bytes,
        backends={"triton": _triton(problem)} if torch.cuda.is_available() else {}, peers={"our FP8 grouped": _fp8},
    )  # fmt: skip
