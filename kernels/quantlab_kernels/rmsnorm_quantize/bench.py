"""Benchmark cases of rmsnorm_quantize: hidden sizes of real models."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels import quantize_fp8_group
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.operands import operand
from quantlab_kernels.rmsnorm_quantize import op, reference

SHAPES = [(1, 4096), (16, 4096), (256, 4096), (4096, 4096), (16384, 4096), (4096, 7168)]
EPS = 1e-5


def _build(m: int, k: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    x = operand("outliers", m, k, seed=seed, device=device).to(torch.bfloat16)
    return x, torch.linspace(0.5, 1.5, k, device=device).to(torch.bfloat16)


def _ours(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return op.rmsnorm_quantize(x, weight, EPS)


def _reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.rmsnorm(x, weight, EPS, 0.0)


def _in_two(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What it replaces: torch's fused norm, then the quantization of its result."""
    out = torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)
    return out, quantize_fp8_group(out)


def cases() -> list[Case]:
    found = []
    for m, k in SHAPES:
        problem = op.Problem(m, k, sm=present_sm())
        found.append(
            Case(
                f"{m}x{k}", problem, functools.partial(_build, m, k), _ours, _reference,
                flops=0, bytes=problem.bytes, peers={"torch rms_norm, then quantize": _in_two},
            )
        )  # fmt: skip
    return found
