"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import empty_group_scale
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.swiglu_quantize import reference

BACKENDS = Backends("swiglu_quantize", ("triton", "eager"), last_resort="eager")
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """m rows of 2 k columns of `dtype` become m rows of k codes; group: 1x128 scales, else one for each row."""

    m: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    group: bool = True
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: both halves read once, codes and scales written once."""
        scales = -(-self.k // 128) if self.group else 1
        return self.m * (2 * self.k * self.dtype.itemsize + self.k + 4 * scales)


def swiglu_quantize(gate_up: Tensor, *, group: bool = True) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``silu(gate) * up``, the product kept in float32 until its code.

    gate_up  [M, 2 I]  bfloat16, float16 or float32; gate is the first half of each row, up the second; any strides
    group    1x128 scales, else one for each row

    Returns codes [M, I] float8_e4m3fn and scale float32, [M, ceil(I/128)] in the layout of `quantize_fp8_group` or
    [M, 1]. Raises RuntimeError for other dtypes, ranks and an odd number of columns.
    """
    return _OP(gate_up, group)


def check(gate_up: Tensor) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    require(
        gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0,
        lambda: f"swiglu_quantize: got shape {tuple(gate_up.shape)}, needs [M, 2 I]",
    )
    require(
        gate_up.dtype in _INPUTS, lambda: f"swiglu_quantize: got {gate_up.dtype}, needs bfloat16, float16 or float32"
    )


def _fake(gate_up: Tensor, group: bool) -> tuple[Tensor, Tensor]:
    check(gate_up)
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    codes = gate_up.new_empty((m, k), dtype=torch.float8_e4m3fn)
    if group:
        return codes, empty_group_scale(gate_up, m, (k + 127) // 128)
    return codes, gate_up.new_empty((m, 1), dtype=torch.float32)


def _cpu(gate_up: Tensor, group: bool) -> tuple[Tensor, Tensor]:
    check(gate_up)
    return reference.swiglu(gate_up, group)


def _cuda(gate_up: Tensor, group: bool) -> tuple[Tensor, Tensor]:
    codes, scale = _fake(gate_up, group)
    if codes.numel() == 0:
        return codes, scale.fill_(1.0)
    problem = Problem(codes.shape[0], codes.shape[1], gate_up.dtype, group, gpu_of(gate_up).sm)
    backend = BACKENDS.select(problem)
    with device_of(gate_up):
        backend.launch(problem, gate_up, codes, scale, backend.config(problem))
    return codes, scale


_OP = define(
    "swiglu_quantize(Tensor gate_up, bool group) -> (Tensor, Tensor)",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
