"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import GemmProblem, check_operands, define_gemm
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.gemm_fp8_row import reference

# Order: measured, see the README's table.
BACKENDS = Backends("gemm_fp8_row", ("sm90_few", "sm90", "scaled_mm", "triton", "eager"), last_resort="eager")


def gemm_fp8_row(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``out[M, N] = (a_scale * a) @ (b_scale * b).T + bias``; FP32 sums, promoted at least every 128 of K.

    a        [M, K]  float8_e4m3fn   activations, row-major
    a_scale  [M, 1]  float32
    b        [N, K]  float8_e4m3fn   weight, row-major
    b_scale  [N, 1]  float32
    bias     [N] or None, any float dtype; added in float32 before the one rounding to `out_dtype`
    out_dtype  bfloat16, float16 or float32

    Any M, N and K; M = 0 gives an empty tensor. The usual fast path of row-wise FP8 (`use_fast_accum=True`) never
    promotes and loses a quarter of a one-signed sum at K = 16384; no backend of this op takes it.
    Within the error bound of `common.bounds`. Raises RuntimeError naming the shapes that disagree.
    """
    return _OP(a, a_scale, b, b_scale, bias, out_dtype)


def check(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> int:
    """Refuse what no backend takes; returns N. Shapes may be symbolic."""
    check_operands("gemm_fp8_row", ((1, -1), (1, -1)), a, a_scale, b, b_scale, bias, out_dtype)
    return b.shape[0]


def problem_of(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> GemmProblem:
    """The problem that these operands on a GPU pose."""
    return GemmProblem(
        a.shape[0], b.shape[0], a.shape[1], out_dtype, None if bias is None else bias.dtype, gpu_of(a).sm
    )


def _launch(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    problem = problem_of(a, b, bias, out.dtype)
    backend = BACKENDS.select(problem)
    operands = a.contiguous(), a_scale.contiguous(), b.contiguous(), b_scale.contiguous(), bias
    backend.launch(*operands, out, backend.config(problem))


_OP = define_gemm("gemm_fp8_row", check=check, reference=reference.gemm, launch=_launch)
