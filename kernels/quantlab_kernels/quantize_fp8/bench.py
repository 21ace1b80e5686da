"""Benchmark cases of quantize_fp8: activations of real widths, and whole weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.operands import operand
from quantlab_kernels.quantize_fp8 import op, reference

_OURS: dict[str, Callable[..., Any]] = {
    "group": op.quantize_fp8_group,
    "token": op.quantize_fp8_token,
    "block": op.quantize_fp8_block,
}
_REFERENCE: dict[str, Callable[..., Any]] = {
    "group": lambda x: reference.group(x, None, False),
    "token": reference.token,
    "block": lambda w: reference.block(w, None, True),
}
SHAPES = {
    "group": [(1, 4096), (16, 4096), (256, 4096), (4096, 4096), (4096, 14336), (8192, 8192)],
    "token": [(1, 4096), (256, 4096), (4096, 4096), (8192, 8192)],
    "block": [(4096, 4096), (28672, 4096), (8192, 8192)],
}


def _build(m: int, k: int, device: torch.device, seed: int) -> tuple[Tensor]:
    return (operand("outliers", m, k, seed=seed, device=device).to(torch.bfloat16),)


def _copy(x: Tensor) -> Any:
    """The same number of bytes read and written by a plain copy: what the memory gives."""
    return x.to(torch.float8_e4m3fn)


def cases() -> list[Case]:
    found = []
    for granularity, shapes in SHAPES.items():
        for m, k in shapes:
            problem = op.Problem(granularity, m, k, power2=granularity == "block", sm=present_sm())
            found.append(
                Case(
                    f"{granularity} {m}x{k}", problem, functools.partial(_build, m, k), _OURS[granularity],
                    _REFERENCE[granularity], flops=0, bytes=problem.bytes, peers={"cast without scales": _copy},
                )
            )  # fmt: skip
    return found
