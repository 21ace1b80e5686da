"""Benchmark cases of attention_quantize: those of attention_prefill."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.attention_quantize import op, reference
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm

# (batch, query heads, key heads, tokens, head dimension, channels that turn first)
SHAPES = [
    (1, 1, 1, 64, 64, 0),
    (4, 16, 16, 4096, 128, 0),
    (1, 16, 16, 32768, 128, 0),
    (1, 32, 8, 8192, 128, 0),
    (1, 32, 8, 2048, 128, 0),
    (4, 16, 16, 4096, 128, 128),
    (1, 32, 8, 8192, 128, 128),
]


def _build(problem: op.Problem, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(problem.batch, problem.heads_q, problem.sq, problem.d)]
    shapes += 2 * [(problem.batch, problem.heads_kv, problem.skv, problem.d)]
    if problem.rotary:
        shapes += 2 * [(1, problem.sq, problem.rotary)]
    return tuple(torch.randn(shape, generator=generator, device=device, dtype=problem.dtype) for shape in shapes)


def _quantize(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> op.Quantized:
    return op.attention_quantize(q, k, v, cos=cos, sin=sin)


def _reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Any:
    rotary = None if cos is None or sin is None else reference.Rotary(cos, sin, False)
    return reference.quantize(q, k, v, None, torch.int8, torch.int8, rotary)


def cases() -> list[Case]:
    found = []
    for batch, heads_q, heads_kv, tokens, d, rotary in SHAPES:
        problem = op.Problem(batch, heads_q, heads_kv, tokens, tokens, d, sm=present_sm(), rotary=rotary)
        found.append(
            Case(
                f"{batch}x{tokens} {heads_q}/{heads_kv}x{d}{' turned' if rotary else ''}", problem,
                functools.partial(_build, problem), _quantize, _reference, flops=0, bytes=problem.bytes,
            )
        )  # fmt: skip
    return found
