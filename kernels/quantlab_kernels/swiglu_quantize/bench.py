"""Benchmark cases of swiglu_quantize: MLP widths of real models."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels import quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.operands import operand
from quantlab_kernels.swiglu_quantize import op, reference

SHAPES = [(1, 14336), (16, 14336), (256, 14336), (4096, 14336), (16384, 14336)]
WHOLE_ROWS = [(256, 14336), (4096, 14336)]  # with one scale each


def _build(m: int, k: int, device: torch.device, seed: int) -> tuple[Tensor]:
    return (operand("outliers", m, 2 * k, seed=seed, device=device).to(torch.bfloat16),)


def _ours(group: bool, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return op.swiglu_quantize(gate_up, group=group)


def _reference(group: bool, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return reference.swiglu(gate_up, group)


def _in_two(group: bool, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """What it replaces: the product in bfloat16, then its quantization."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (quantize_fp8_group if group else quantize_fp8_token)(torch.nn.functional.silu(gate) * up)


def cases() -> list[Case]:
    return [_case(m, k, True) for m, k in SHAPES] + [_case(m, k, False) for m, k in WHOLE_ROWS]


def _case(m: int, k: int, group: bool) -> Case:
    problem = op.Problem(m, k, group=group, sm=present_sm())
    ours, exact, peer = (functools.partial(way, group) for way in (_ours, _reference, _in_two))
    return Case(
        f"{m}x{k}" if group else f"token {m}x{k}", problem, functools.partial(_build, m, k), ours, exact,
        flops=0, bytes=problem.bytes, peers={"eager silu * up, then quantize": peer},
    )  # fmt: skip
