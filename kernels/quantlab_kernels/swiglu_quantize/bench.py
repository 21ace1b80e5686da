"""Benchmark cases of swiglu_quantize: MLP widths of real models."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels import quantize_fp8_group
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.operands import operand
from quantlab_kernels.swiglu_quantize import op, reference

SHAPES = [(1, 14336), (16, 14336), (256, 14336), (4096, 14336), (16384, 14336)]


def _build(m: int, k: int, device: torch.device, seed: int) -> tuple[Tensor]:
    return (operand("outliers", m, 2 * k, seed=seed, device=device).to(torch.bfloat16),)


def _in_two(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """What it replaces: the product in bfloat16, then its quantization."""
    gate, up = gate_up.chunk(2, dim=-1)
    return quantize_fp8_group(torch.nn.functional.silu(gate) * up)


def cases() -> list[Case]:
    found = []
    for m, k in SHAPES:
        problem = op.Problem(m, k, sm=present_sm())
        found.append(
            Case(
                f"{m}x{k}", problem, functools.partial(_build, m, k), op.swiglu_quantize, reference.swiglu,
                flops=0, bytes=problem.bytes, peers={"eager silu * up, then quantize": _in_two},
            )
        )  # fmt: skip
    return found
