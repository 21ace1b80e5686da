"""Benchmark cases of moe_route: routers of real mixtures of experts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.moe_route import op, reference

# name -> (K, experts, rule)
MODELS = {
    "deepseek-v3": (7168, 256, op.Rule(8, sigmoid=True, groups=8, kept=4, best=2, normalized=True, factor=2.5)),
    "deepseek-v2-lite": (2048, 64, op.Rule(6)),
    "qwen3-30b": (2048, 128, op.Rule(8, normalized=True)),
}
TOKENS = (1, 16, 128, 8192)


def _build(problem: op.Problem, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    x, weight = (
        torch.randn(rows, problem.k, generator=generator, device=device, dtype=torch.bfloat16)
        for rows in (problem.tokens, problem.experts)
    )
    return x, weight * problem.k**-0.5, torch.rand(problem.experts, generator=generator, device=device) * 0.1


def _ours(x: Tensor, weight: Tensor, bias: Tensor, rule: op.Rule) -> Tensor:
    return op.moe_route(x, weight, rule, bias=bias)[2]


def _step_by_step(x: Tensor, weight: Tensor, bias: Tensor, rule: op.Rule) -> Tensor:
    """What it replaces: operands in float32, product, scores, choice."""
    return reference.choose(reference.logits_of(x, weight, False), bias, rule)[1]


def cases() -> list[Case]:
    found = []
    for name, (k, experts, rule) in MODELS.items():
        for tokens in TOKENS:
            problem = op.Problem(tokens, k, experts, rule, True, sm=present_sm())
            ours, steps = (functools.partial(call, rule=rule) for call in (_ours, _step_by_step))
            found.append(
                Case(
                    f"{tokens} {name}", problem, functools.partial(_build, problem), ours, steps,
                    flops=2 * tokens * k * experts, bytes=problem.bytes, peers={"transformers' steps": steps},
                    wide=True,
                )
            )  # fmt: skip
    return found
