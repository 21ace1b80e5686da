"""The definition, and the CPU implementation (in float32)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.quantize_fp8 import reference


def product(gate_up: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``silu(gate) * up`` [M, I] of gate_up [M, 2 I], computed in `dtype`."""
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M, I] and scale [M, ceil(I/128)] of the product in float32, which is never rounded to 16 bits."""
    return reference.group(product(gate_up, torch.float32), None, False)
