"""Benchmark cases of attention_quantize: those of attention_prefill."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.attention_quantize import op, reference
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm

# (batch, query heads, key heads, tokens, head dimension)
SHAPES = [
    (1, 1, 1, 64, 64),
    (4, 16, 16, 4096, 128),
    (1, 16, 16, 32768, 128),
    (1, 32, 8, 8192, 128),
    (1, 32, 8, 2048, 128),
]


def _build(problem: op.Problem, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(problem.heads_q, problem.sq), *2 * [(problem.heads_kv, problem.skv)]]
    return tuple(
        torch.randn(problem.batch, h, s, problem.d, generator=generator, device=device, dtype=problem.dtype)
        for h, s in shapes
    )


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return reference.quantize(q, k, v, None, torch.int8, torch.int8)


def cases() -> list[Case]:
    found = []
    for batch, heads_q, heads_kv, tokens, d in SHAPES:
        problem = op.Problem(batch, heads_q, heads_kv, tokens, tokens, d, sm=present_sm())
        found.append(
            Case(
                f"{batch}x{tokens} {heads_q}/{heads_kv}x{d}", problem, functools.partial(_build, problem),
                op.attention_quantize, _reference, flops=0, bytes=problem.bytes,
            )
        )  # fmt: skip
    return found
