"""The definition, and the CPU implementation (in float32)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.quantize_fp8 import reference


def product(gate_up: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``silu(gate) * up`` [M, I] of gate_up [M, 2 I], computed in `dtype`."""
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu(gate_up: Tensor, group: bool = True) -> tuple[Tensor, Tensor]:
    """Codes [M, I] and scale [M, ceil(I/128)] or [M, 1] of the product in float32, never rounded to 16 bits."""
    exact = product(gate_up, torch.float32)
    return reference.group(exact, None, False) if group else reference.token(exact)
