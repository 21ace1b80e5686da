"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import empty_group_scale
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.rmsnorm_quantize import reference

BACKENDS = Backends("rmsnorm_quantize", ("triton", "eager"), last_resort="eager")
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """m rows of k columns of `dtype`; group: 1x128 scales, else one for each row."""

    m: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    group: bool = True
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: the input read once, the result, codes and scales written once."""
        scales = -(-self.k // 128) if self.group else 1
        return self.m * (2 * self.k * self.dtype.itemsize + self.k + 4 * scales)


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, group: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """``out = x / sqrt(mean(x^2) + eps) * (offset + weight)``, and its codes and scales, in one pass.

    x       [M, K]  bfloat16, float16 or float32, any strides
    weight  [K]  any float dtype
    offset  1.0 for norms that store their weight less one (Gemma)
    group   1x128 scales, else one for each row

    Returns out [M, K] in x's dtype, computed in float32 and rounded once; codes [M, K] float8_e4m3fn and scale
    [M, ceil(K/128)] or [M, 1] float32, equal to `quantize_fp8_group(out)` or `quantize_fp8_token(out)`. Raises
    RuntimeError for other dtypes and shapes.
    """
    return _OP(x, weight, eps, offset, group)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """The norm alone: `out` of `rmsnorm_quantize` for x [..., K], contiguous. Rows of heads that lie among those of
    other projections are read where they are."""
    return _PLAIN(x, weight, eps, offset)


def check(x: Tensor, weight: Tensor) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    require(x.dtype in _INPUTS, lambda: f"rmsnorm_quantize: got {x.dtype}, needs bfloat16, float16 or float32")
    require(
        x.dim() == 2 and tuple(weight.shape) == (x.shape[1],) and weight.dtype.is_floating_point,
        lambda: f"rmsnorm_quantize: x {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}; needs [M, K], [K]",
    )


def _fake(x: Tensor, weight: Tensor, eps: float, offset: float, group: bool) -> tuple[Tensor, Tensor, Tensor]:
    check(x, weight)
    m, k = x.shape
    codes = x.new_empty((m, k), dtype=torch.float8_e4m3fn)
    scale = empty_group_scale(x, m, (k + 127) // 128) if group else x.new_empty((m, 1), dtype=torch.float32)
    return x.new_empty((m, k)), codes, scale


def _cpu(x: Tensor, weight: Tensor, eps: float, offset: float, group: bool) -> tuple[Tensor, Tensor, Tensor]:
    check(x, weight)
    return reference.rmsnorm(x, weight, eps, offset, group)


def _cuda(x: Tensor, weight: Tensor, eps: float, offset: float, group: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, codes, scale = _fake(x, weight, eps, offset, group)
    if out.numel() == 0:
        return out, codes, scale.fill_(1.0)
    problem = Problem(x.shape[0], x.shape[1], x.dtype, group, gpu_of(x).sm)
    backend = BACKENDS.select(problem)
    with device_of(x):
        backend.launch(problem, x, weight.contiguous(), eps, offset, out, codes, scale, backend.config(problem))
    return out, codes, scale


_OP = define(
    "rmsnorm_quantize(Tensor x, Tensor weight, float eps, float offset, bool group) -> (Tensor, Tensor, Tensor)",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip


def _plain_fake(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    check(x.flatten(0, -2) if x.dim() != 2 else x, weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _plain_cpu(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    _plain_fake(x, weight, eps, offset)
    return reference.norm(x, weight, eps, offset, torch.float32).to(x.dtype)


def _plain_cuda(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out = _plain_fake(x, weight, eps, offset)
    if out.numel() == 0:
        return out
    heads = x.shape[-2] if x.dim() > 2 else 1
    rows = x.reshape(-1, heads, x.shape[-1])
    problem = Problem(rows.shape[0] * heads, x.shape[-1], x.dtype, False, gpu_of(x).sm)
    with device_of(x):
        BACKENDS.select(problem).launch_plain(problem, rows, weight.contiguous(), eps, offset, out)
    return out


_PLAIN = define(
    "rmsnorm(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
    fake=_plain_fake, cpu=_plain_cpu, cuda=_plain_cuda,
)  # fmt: skip
