"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.int4 import GROUP, ROWS, SCALE_DTYPES, Int4Problem, check_out_dtype
from quantlab_kernels.common.ops import define
from quantlab_kernels.gemm_int4_grouped import reference

BACKENDS = Backends("gemm_int4_grouped", ("sm90", "triton", "eager"), last_resort="eager")


def gemm_int4_grouped(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Rows sorted by expert, each times its expert's INT4 weight: [S, N]. Group sums are promoted to FP32.

    a        [S, K]  rows of expert 0 first, then those of expert 1, ...; float8_e4m3fn, or without a_scale bfloat16 or
             float16 (float32 on a CPU too); K a multiple of 128
    a_scale  [S, K/128] float32 in the layout of `quantize_fp8_group`, or [S, 1], or None
    b        int32: words [E, N, K/8] of `pack_int4`, whose codes may be -8, or tiles [E, N/64, K/128, ...] that
             `repack_int4` makes of all experts' rows, N a multiple of 64
    b_scale  [E, N, K/128]  bfloat16, float16 or float32; fastest where [E N, K/128] has the layout of
             `common.gemm.as_group_scale`, others are copied in every call
    counts   [E] int64: rows of each expert, on the device; they add up to S at most. Rows behind are not written
    out_dtype  bfloat16, float16 or float32

    Reads the counts on the device: nothing waits for them, and a CUDA graph may hold the call. Within the error bound
    of `common.bounds`, two runs give the same bits. Raises RuntimeError naming what does not fit.
    """
    return _OP(a, a_scale, b, b_scale, counts, out_dtype)


def check(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    op = "gemm_int4_grouped"
    _check_activations(op, a, a_scale)
    k = a.shape[1]
    torch._check(k % GROUP == 0, lambda: f"{op}: K = {k}, needs a multiple of {GROUP}; pad weight and activations")
    torch._check(
        b_scale.dtype in SCALE_DTYPES and b_scale.dim() == 3 and b_scale.shape[2] == k // GROUP,
        lambda: f"{op}: b_scale is {b_scale.dtype} {tuple(b_scale.shape)}, needs floats [E, N, {k // GROUP}]",
    )
    experts, n, groups = b_scale.shape
    tail = (1024,) if a_scale is not None else (2, 512)
    words, tiles = (experts, n, k // 8), (experts, n // ROWS, groups, *tail)
    given = tuple(b.shape)
    torch._check(
        b.dtype == torch.int32 and given in ((words, tiles) if n % ROWS == 0 else (words,)),
        lambda: f"{op}: b is {b.dtype} {given}, needs int32 words {words} or tiles {tiles} for these activations",
    )
    torch._check(
        counts.dtype == torch.int64 and tuple(counts.shape) == (experts,),
        lambda: f"{op}: counts are {counts.dtype} {tuple(counts.shape)}, needs int64 {(experts,)}",
    )
    check_out_dtype(op, out_dtype)


def _check_activations(op: str, a: Tensor, a_scale: Tensor | None) -> None:
    fp8, wide = torch.float8_e4m3fn, (torch.bfloat16, torch.float16, torch.float32)
    torch._check(a.dim() == 2, lambda: f"{op}: activations {tuple(a.shape)}, needs [S, K]")
    if a_scale is None:
        torch._check(a.dtype in wide, lambda: f"{op}: a is {a.dtype} without a_scale, needs one of {wide}")
        return
    torch._check(a.dtype == fp8, lambda: f"{op}: a is {a.dtype} beside an a_scale, needs {fp8}")
    rows, groups = a.shape[0], a.shape[1] // GROUP
    torch._check(
        a_scale.dtype == torch.float32 and tuple(a_scale.shape) in ((rows, 1), (rows, groups)),
        lambda: (
            f"{op}: a_scale is {a_scale.dtype} {tuple(a_scale.shape)}, needs float32 {(rows, groups)} or {(rows, 1)}"
        ),
    )


def problem_of(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Int4Problem:
    """The problem that these operands on a GPU pose."""
    experts, n, _ = b_scale.shape
    grouped = a_scale is not None and a_scale.shape[1] > 1
    return Int4Problem(
        a.shape[0], n, a.shape[1], a.dtype, out_dtype, None, b_scale.dtype, grouped, b.dim() > 3, gpu_of(a).sm, experts
    )


def _fake(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    check(a, a_scale, b, b_scale, counts, out_dtype)
    return a.new_empty((a.shape[0], b_scale.shape[1]), dtype=out_dtype)


def _cpu(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    check(a, a_scale, b, b_scale, counts, out_dtype)
    return reference.gemm(a, a_scale, b, b_scale, counts, torch.float32).to(out_dtype)


def _cuda(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    out = _fake(a, a_scale, b, b_scale, counts, out_dtype)
    if out.numel() == 0 or a.shape[1] == 0:
        return out.zero_()
    problem = problem_of(a, a_scale, b, b_scale, out_dtype)
    backend = BACKENDS.select(problem)
    if a_scale is not None:
        a_scale = as_group_scale(a_scale) if problem.grouped else a_scale.contiguous()
    scale = as_group_scale(b_scale.flatten(0, 1)).unflatten(0, (problem.experts, problem.n))
    with torch.cuda.device(a.device):
        backend.launch(
            a.contiguous(), a_scale, b.contiguous(), scale, counts.contiguous(), out, backend.config(problem)
        )
    return out


_OP = define(
    "gemm_int4_grouped(Tensor a, Tensor? a_scale, Tensor b, Tensor b_scale, Tensor counts, ScalarType out_dtype)"
    " -> Tensor",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
