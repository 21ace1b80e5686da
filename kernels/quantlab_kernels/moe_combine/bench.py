"""Benchmark cases of moe_combine: tokens of real mixtures of experts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.moe_combine import op, reference

MODELS = {"deepseek-v3": (7168, 8), "qwen3-30b": (2048, 8)}
TOKENS = (1, 16, 128, 1024, 8192)


def _build(problem: op.Problem, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    rows = problem.tokens * problem.choices
    y = torch.randn(rows, problem.k, generator=generator, device=device, dtype=torch.bfloat16)
    positions = torch.randperm(rows, generator=generator, device=device).view(problem.tokens, -1).int()
    return y, positions, torch.rand(positions.shape, generator=generator, device=device)


def _step_by_step(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """What it replaces: gather, multiply, sum."""
    return (y[positions.long()] * weights[..., None].to(y.dtype)).sum(1)


def cases() -> list[Case]:
    found = []
    for name, (k, choices) in MODELS.items():
        for tokens in TOKENS:
            problem = op.Problem(tokens, k, choices, sm=present_sm())
            found.append(
                Case(
                    f"{tokens} {name}", problem, functools.partial(_build, problem), op.moe_combine, reference.combine,
                    flops=0, bytes=problem.bytes, peers={"gather, multiply, sum": _step_by_step},
                )
            )  # fmt: skip
    return found
