"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.int4 import Int4Problem, check_weight
from quantlab_kernels.common.ops import define
from quantlab_kernels.gemm_int4 import reference

BACKENDS = Backends("gemm_int4", ("sm90", "triton", "eager"), last_resort="eager")


def gemm_int4(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out[M, N] = x @ (b_scale * b).T + bias`` in the dtype of x; FP32 sums, scales applied to them.

    x        [M, K]  bfloat16 or float16 (float32 on a CPU too), row-major; K a multiple of 128
    b        int32   weight: tiles of ``repack_int4(words, activation_bits=16)``, or words [N, K/8] of `pack_int4`
    b_scale  [N, K/128]  bfloat16, float16 or float32; fastest in the layout of `common.gemm.as_group_scale`, others
             are copied in every call
    bias     [N] or None, any float dtype; added in float32 before the one rounding

    Any M and N; M = 0 gives an empty tensor. Within the error bound of `common.bounds`, two runs give the same bits.
    Raises RuntimeError naming the shapes that disagree.
    """
    return _OP(x, b, b_scale, bias)


def check(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    torch._check(x.dtype in kinds, lambda: f"gemm_int4: x is {x.dtype}, needs one of {kinds}")
    check_weight("gemm_int4", 16, x, b, b_scale, bias)


def problem_of(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> Int4Problem:
    """The problem that these operands on a GPU pose."""
    return Int4Problem(
        x.shape[0], b_scale.shape[0], x.shape[1], x.dtype, x.dtype, None if bias is None else bias.dtype,
        b_scale.dtype, False, b.dim() == 4, gpu_of(x).sm,
    )  # fmt: skip


def _fake(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, b, b_scale, bias)
    return x.new_empty((x.shape[0], b_scale.shape[0]))


def _cpu(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, b, b_scale, bias)
    return reference.gemm(x, b, b_scale, bias, torch.float32).to(x.dtype)


def _cuda(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    out = _fake(x, b, b_scale, bias)
    if out.numel() == 0:
        return out
    if x.shape[1] == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    problem = problem_of(x, b, b_scale, bias)
    backend = BACKENDS.select(problem)
    with torch.cuda.device(x.device):
        backend.launch(x.contiguous(), b.contiguous(), as_group_scale(b_scale), bias, out, backend.config(problem))
    return out


_OP = define("gemm_int4(Tensor x, Tensor b, Tensor b_scale, Tensor? bias) -> Tensor", fake=_fake, cpu=_cpu, cuda=_cuda)
