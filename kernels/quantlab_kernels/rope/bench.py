"""Benchmark cases of rope: the Llama-3.1-8B shape, and heads of which a part turns."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.rope import op, reference

# tokens, query heads, key heads, channels, channels that turn
SHAPES = [(1, 32, 8, 128, 128), (256, 32, 8, 128, 128), (16384, 32, 8, 128, 128), (16384, 32, 8, 128, 64)]


def _build(
    tokens: int, heads_q: int, heads_kv: int, d: int, r: int, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """As in a model: queries and keys are columns of one product."""
    generator = torch.Generator(device).manual_seed(seed)
    joined = torch.randn(1, tokens, heads_q + 2 * heads_kv, d, device=device, generator=generator).to(torch.bfloat16)
    q, k, _ = joined.transpose(1, 2).split([heads_q, heads_kv, heads_kv], dim=1)
    angle = torch.randn(1, tokens, r, device=device, generator=generator)
    return q, k, angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)


def cases() -> list[Case]:
    found = []
    for tokens, heads_q, heads_kv, d, r in SHAPES:
        problem = op.Problem(tokens, heads_q + heads_kv, d, r, sm=present_sm())
        found.append(
            Case(
                f"{tokens} tokens, {heads_q} + {heads_kv} heads, {r} of {d} channels", problem,
                functools.partial(_build, tokens, heads_q, heads_kv, d, r), op.rope, _reference,
                flops=0, bytes=problem.bytes, peers={"plain torch, as in transformers": _reference},
            )
        )  # fmt: skip
    return found
