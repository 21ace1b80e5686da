"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import as_group_scale, define_gemm
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.int4 import GROUP, Int4Problem, check_out_dtype, check_weight
from quantlab_kernels.gemm_int4_fp8 import reference

BACKENDS = Backends("gemm_int4_fp8", ("sm90_few", "sm90", "triton", "eager"), last_resort="eager")


def gemm_int4_fp8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``out[M, N] = (a_scale * a) @ (b_scale * b).T + bias``; group sums are promoted to FP32, scales applied there.

    a        [M, K]  float8_e4m3fn   activations, row-major; K a multiple of 128
    a_scale  [M, 1] float32, or [M, K/128] float32 as `quantize_fp8_group` writes it (other strides are copied first)
    b        int32   weight: tiles of `repack_int4`, or words [N, K/8] of `pack_int4`, whose codes may be -8
    b_scale  [N, K/128]  bfloat16, float16 or float32; fastest in the layout of `common.gemm.as_group_scale`, others
             are copied in every call
    bias     [N] or None, any float dtype; added in float32 before the one rounding to `out_dtype`
    out_dtype  bfloat16, float16 or float32

    Any M and N; M = 0 gives an empty tensor. Within the error bound of `common.bounds`, two runs give the same bits.
    Raises RuntimeError naming the shapes that disagree.
    """
    return _OP(a, a_scale, b, b_scale, bias, out_dtype)


def check(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> int:
    """Refuse what no backend takes; returns N. Shapes may be symbolic."""
    op, fp8 = "gemm_int4_fp8", torch.float8_e4m3fn
    torch._check(a.dtype == fp8, lambda: f"{op}: a is {a.dtype}, needs {fp8}")
    check_weight(op, 8, a, b, b_scale, bias)
    m, groups = a.shape[0], a.shape[1] // GROUP
    torch._check(
        a_scale.dtype == torch.float32 and tuple(a_scale.shape) in ((m, 1), (m, groups)),
        lambda: f"{op}: a_scale is {a_scale.dtype} {tuple(a_scale.shape)}, needs float32 {(m, 1)} or {(m, groups)}",
    )
    check_out_dtype(op, out_dtype)
    return b_scale.shape[0]


def problem_of(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Int4Problem:
    """The problem that these operands on a GPU pose."""
    return Int4Problem(
        a.shape[0], b_scale.shape[0], a.shape[1], a.dtype, out_dtype, None if bias is None else bias.dtype,
        b_scale.dtype, a_scale.shape[1] > 1, b.dim() == 3, gpu_of(a).sm,
    )  # fmt: skip


def _launch(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    problem = problem_of(a, a_scale, b, b_scale, bias, out.dtype)
    backend = BACKENDS.select(problem)
    scale = as_group_scale(a_scale) if problem.grouped else a_scale.contiguous()
    operands = a.contiguous(), scale, b.contiguous(), as_group_scale(b_scale), bias
    backend.launch(*operands, out, backend.config(problem))


_OP = define_gemm("gemm_int4_fp8", check=check, reference=reference.gemm, launch=_launch)
