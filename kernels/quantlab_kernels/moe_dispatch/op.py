"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import empty_group_scale
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.ops import define
from quantlab_kernels.moe_dispatch import reference

BACKENDS = Backends("moe_dispatch", ("triton", "eager"), last_resort="eager")
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """tokens of k columns, each to `choices` of `experts`; group: 1x128 scales, else one per token."""

    tokens: int
    k: int
    choices: int
    experts: int
    group: bool = True
    dtype: torch.dtype = torch.bfloat16
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: tokens read once, their codes and scales written for each choice."""
        scales = -(-self.k // 128) if self.group else 1
        return self.tokens * (self.k * self.dtype.itemsize + self.choices * (self.k + 4 * scales))


def moe_dispatch(
    x: Tensor, top_k_index: Tensor, experts: int, *, group: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of tokens, sorted by expert: what `gemm_fp8_grouped` reads.

    x            [T, K]  bfloat16, float16 or float32
    top_k_index  [T, k]  int64, the experts of each token; an index outside 0 .. E-1 is another rank's and left out
    experts      E;  group: 1x128 scales (`quantize_fp8_group`), else one per token (`quantize_fp8_token`)

    Returns codes [T k, K] float8_e4m3fn, scale [T k, ceil(K/128)] or [T k, 1] float32, positions [T, k] int32 (the row
    of each choice, -1 where it was left out) and counts [E] int64. Rows of an expert keep the order of the tokens, so
    results repeat bit for bit; rows behind the last expert's are not written. Raises RuntimeError for other shapes.
    """
    return _OP(x, top_k_index, experts, group)


def check(x: Tensor, top_k_index: Tensor, experts: int) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    torch._check(
        x.dim() == 2 and x.dtype in _INPUTS,
        lambda: f"moe_dispatch: x is {x.dtype} {tuple(x.shape)}, needs floats of shape [T, K]",
    )
    torch._check(
        top_k_index.dim() == 2 and top_k_index.dtype == torch.int64 and top_k_index.shape[0] == x.shape[0],
        lambda: (
            f"moe_dispatch: top_k_index is {top_k_index.dtype} {tuple(top_k_index.shape)}, "
            f"needs int64 [{x.shape[0]}, k]"
        ),
    )
    torch._check(experts > 0, lambda: f"moe_dispatch: {experts} experts, needs one at least")


def _fake(x: Tensor, top_k_index: Tensor, experts: int, group: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(x, top_k_index, experts)
    rows, k = x.shape[0] * top_k_index.shape[1], x.shape[1]
    scale = empty_group_scale(x, rows, (k + 127) // 128) if group else x.new_empty((rows, 1), dtype=torch.float32)
    return (
        x.new_empty((rows, k), dtype=torch.float8_e4m3fn), scale,
        x.new_empty(top_k_index.shape, dtype=torch.int32), x.new_empty(experts, dtype=torch.int64),
    )  # fmt: skip


def _cpu(x: Tensor, top_k_index: Tensor, experts: int, group: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale, _, _ = _fake(x, top_k_index, experts, group)
    positions, counts = reference.route(top_k_index, experts)
    reference.scatter(*reference.quantize(x, group), positions, (codes, scale))
    return codes, scale, positions, counts


def _cuda(x: Tensor, top_k_index: Tensor, experts: int, group: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale, positions, counts = _fake(x, top_k_index, experts, group)
    if codes.numel() == 0:
        return codes, scale, positions, counts.zero_()
    problem = Problem(x.shape[0], x.shape[1], top_k_index.shape[1], experts, group, x.dtype, gpu_of(x).sm)
    backend = BACKENDS.select(problem)
    with torch.cuda.device(x.device):
        backend.launch(
            problem, x.contiguous(), top_k_index.contiguous(), codes, scale, positions, counts, backend.config(problem)
        )
    return codes, scale, positions, counts


_OP = define(
    "moe_dispatch(Tensor x, Tensor top_k_index, int experts, bool group) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
