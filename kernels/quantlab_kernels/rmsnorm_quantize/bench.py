"""Benchmark cases of rmsnorm_quantize: hidden sizes of real models."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels import quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.operands import operand
from quantlab_kernels.rmsnorm_quantize import op, reference

SHAPES = [(1, 4096), (16, 4096), (256, 4096), (4096, 4096), (16384, 4096), (4096, 7168)]
WHOLE_ROWS = [(256, 4096), (4096, 4096)]  # with one scale each
EPS = 1e-5


def _build(m: int, k: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    x = operand("outliers", m, k, seed=seed, device=device).to(torch.bfloat16)
    return x, torch.linspace(0.5, 1.5, k, device=device).to(torch.bfloat16)


def _ours(group: bool, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return op.rmsnorm_quantize(x, weight, EPS, group=group)


def _reference(group: bool, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.rmsnorm(x, weight, EPS, 0.0, group)


def _in_two(group: bool, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What it replaces: torch's fused norm, then the quantization of its result."""
    out = torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)
    return out, (quantize_fp8_group if group else quantize_fp8_token)(out)


def cases() -> list[Case]:
    return [_case(m, k, True) for m, k in SHAPES] + [_case(m, k, False) for m, k in WHOLE_ROWS]


def _case(m: int, k: int, group: bool) -> Case:
    problem = op.Problem(m, k, group=group, sm=present_sm())
    ours, exact, peer = (functools.partial(way, group) for way in (_ours, _reference, _in_two))
    return Case(
        f"{m}x{k}" if group else f"token {m}x{k}", problem, functools.partial(_build, m, k), ours, exact,
        flops=0, bytes=problem.bytes, peers={"torch rms_norm, then quantize": peer},
    )  # fmt: skip
