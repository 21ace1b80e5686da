"""Benchmark cases of moe_dispatch: tokens of real mixtures of experts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels import quantize_fp8_group
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.moe_dispatch import op, reference

# name -> (K, choices, experts)
MODELS = {"deepseek-v3": (7168, 8, 256), "qwen3-30b": (2048, 8, 128)}
TOKENS = (1, 16, 128, 1024, 8192)


def _build(problem: op.Problem, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(problem.tokens, problem.k, generator=generator, device=device, dtype=torch.bfloat16)
    scores = torch.rand(problem.tokens, problem.experts, generator=generator, device=device)
    return x, scores.topk(problem.choices).indices


def _step_by_step(x: Tensor, top_k_index: Tensor, experts: int) -> tuple[Tensor, ...]:
    """What it replaces: sort, count, quantize, gather."""
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    counts = (top_k_index.reshape(-1, 1) == torch.arange(experts, device=x.device)).sum(0)
    codes, scale = quantize_fp8_group(x)
    rows = order // top_k_index.shape[1]
    return codes[rows], scale[rows], order, counts


def _reference(x: Tensor, top_k_index: Tensor, experts: int) -> tuple[Tensor, ...]:
    return reference.route(top_k_index, experts)


def cases() -> list[Case]:
    found = []
    for name, (k, choices, experts) in MODELS.items():
        for tokens in TOKENS:
            problem = op.Problem(tokens, k, choices, experts, sm=present_sm())
            ours, reference_, steps = (
                functools.partial(call, experts=experts) for call in (op.moe_dispatch, _reference, _step_by_step)
            )
            found.append(
                Case(
                    f"{tokens} {name}", problem, functools.partial(_build, problem), ours, reference_, flops=0,
                    bytes=problem.bytes, peers={"sort, count, quantize, gather": steps},
                )
            )  # fmt: skip
    return found
