"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.ops import define
from quantlab_kernels.moe_combine import reference

BACKENDS = Backends("moe_combine", ("triton", "eager"), last_resort="eager")


@dataclass(frozen=True)
class Problem:
    """tokens of k columns, each the sum of `choices` rows."""

    tokens: int
    k: int
    choices: int
    dtype: torch.dtype = torch.bfloat16
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: every row read once, every token written once."""
        return self.tokens * self.k * self.dtype.itemsize * (self.choices + 1)


def moe_combine(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """[T, K] in y's dtype: the weighted sum of each token's rows, added in float32 in the order of its choices.

    y          [S, K]  bfloat16, float16 or float32: what the experts made of the rows of `moe_dispatch`
    positions  [T, k]  int32 of `moe_dispatch`; -1 adds nothing, whatever the rows that nobody wrote hold
    weights    [T, k]  any float dtype
    """
    return _OP(y, positions, weights)


def check(y: Tensor, positions: Tensor, weights: Tensor) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    torch._check(
        y.dim() == 2 and y.dtype in (torch.bfloat16, torch.float16, torch.float32),
        lambda: f"moe_combine: y is {y.dtype} {tuple(y.shape)}, needs floats of shape [S, K]",
    )
    torch._check(
        positions.dim() == 2 and positions.dtype == torch.int32 and positions.shape == weights.shape,
        lambda: (
            f"moe_combine: positions are {positions.dtype} {tuple(positions.shape)} and weights "
            f"{tuple(weights.shape)}, needs int32 and floats of the same shape [T, k]"
        ),
    )
    torch._check(weights.dtype.is_floating_point, lambda: f"moe_combine: weights are {weights.dtype}, needs floats")


def _fake(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    check(y, positions, weights)
    return y.new_empty((positions.shape[0], y.shape[1]))


def _cpu(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    check(y, positions, weights)
    return reference.combine(y, positions, weights, torch.float32).to(y.dtype)


def _cuda(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    out = _fake(y, positions, weights)
    if out.numel() == 0 or positions.shape[1] == 0:
        return out.zero_()
    problem = Problem(out.shape[0], out.shape[1], positions.shape[1], y.dtype, gpu_of(y).sm)
    backend = BACKENDS.select(problem)
    with torch.cuda.device(y.device):
        backend.launch(
            problem, y.contiguous(), positions.contiguous(), weights.contiguous(), out, backend.config(problem)
        )
    return out


_OP = define("moe_combine(Tensor y, Tensor positions, Tensor weights) -> Tensor", fake=_fake, cpu=_cpu, cuda=_cuda)
