"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import OUT_DTYPES, as_group_scale
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.ops import define
from quantlab_kernels.gemm_fp8_grouped import reference

BACKENDS = Backends("gemm_fp8_grouped", ("sm90", "triton", "eager"), last_resort="eager")


@dataclass(frozen=True)
class GroupedProblem:
    """``out[S, N] = a[S, K] @ b[expert of the row].T``: the key of dispatch.

    rows, n, k  extents; experts E; blocked: 1x128 and 128x128 scales, otherwise one per row of a and of b
    """

    rows: int
    n: int
    k: int
    experts: int
    blocked: bool = True
    out_dtype: torch.dtype = torch.bfloat16
    sm: int = 90

    @property
    def mean(self) -> float:
        """Rows of an expert, were they spread evenly. How they are spread is known on the GPU only."""
        return self.rows / self.experts

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.n * self.k

    def __str__(self) -> str:
        dtype = str(self.out_dtype).removeprefix("torch.")
        scales = "block" if self.blocked else "row"
        return f"{self.rows} rows of {self.experts} experts N={self.n} K={self.k} {scales} {dtype} on sm_{self.sm}"


def gemm_fp8_grouped(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Rows sorted by expert, each times its expert's weight: [S, N]. FP32 sums, promoted at least every 128 of K.

    a        [S, K]  float8_e4m3fn   rows of expert 0 first, then those of expert 1, ...
    a_scale  [S, ceil(K/128)] float32 in the layout of `quantize_fp8_group`, or [S, 1]
    b        [E, N, K]  float8_e4m3fn
    b_scale  [E, ceil(N/128), ceil(K/128)] float32, or [E, N, 1] beside an a_scale [S, 1]
    counts   [E] int64: rows of each expert, on the device; they add up to S at most. Rows behind are not written
    out_dtype  bfloat16, float16 or float32

    Reads the counts on the device: nothing waits for them, and a CUDA graph may hold the call. Within the error bound
    of `common.bounds`. Raises RuntimeError naming what does not fit.
    """
    return _OP(a, a_scale, b, b_scale, counts, out_dtype)


def check(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    fp8, op = torch.float8_e4m3fn, "gemm_fp8_grouped"
    torch._check(a.dtype == fp8 and b.dtype == fp8, lambda: f"{op}: a is {a.dtype}, b is {b.dtype}, needs {fp8}")
    torch._check(
        a.dim() == 2 and b.dim() == 3 and a.shape[1] == b.shape[2],
        lambda: f"{op}: a {tuple(a.shape)} and b {tuple(b.shape)} do not match, needs [S, K] and [E, N, K]",
    )
    (rows, k), (experts, n, _) = a.shape, b.shape
    block = (rows, (k + 127) // 128), (experts, (n + 127) // 128, (k + 127) // 128)
    each = (rows, 1), (experts, n, 1)
    given = tuple(a_scale.shape), tuple(b_scale.shape)
    torch._check(
        a_scale.dtype == b_scale.dtype == torch.float32 and given in (block, each),
        lambda: (
            f"{op}: scales are {a_scale.dtype} {given[0]} and {b_scale.dtype} {given[1]}, "
            f"needs float32 {block[0]} and {block[1]}, or {each[0]} and {each[1]}"
        ),
    )
    torch._check(
        counts.dtype == torch.int64 and tuple(counts.shape) == (experts,),
        lambda: f"{op}: counts are {counts.dtype} {tuple(counts.shape)}, needs int64 {(experts,)}",
    )
    torch._check(out_dtype in OUT_DTYPES, lambda: f"{op}: out_dtype {out_dtype}, needs one of {OUT_DTYPES}")


def _fake(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype) -> Tensor:
    check(a, a_scale, b, b_scale, counts, out_dtype)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _cpu(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype) -> Tensor:
    check(a, a_scale, b, b_scale, counts, out_dtype)
    return reference.gemm(a, a_scale, b, b_scale, counts, torch.float32).to(out_dtype)


def _cuda(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype) -> Tensor:
    out = _fake(a, a_scale, b, b_scale, counts, out_dtype)
    if out.numel() == 0 or a.shape[1] == 0:
        return out.zero_()
    problem = problem_of(a, a_scale, b, b_scale, out_dtype)
    backend = BACKENDS.select(problem)
    scale = as_group_scale(a_scale) if problem.blocked else a_scale.contiguous()
    with torch.cuda.device(a.device):
        backend.launch(
            a.contiguous(), scale, b.contiguous(), b_scale.contiguous(), counts, out, backend.config(problem)
        )
    return out


def problem_of(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> GroupedProblem:
    """The problem that these operands on a GPU pose."""
    experts, n, k = b.shape
    blocked = not reference.row_wise(a_scale, b, b_scale)
    return GroupedProblem(a.shape[0], n, k, experts, blocked, out_dtype, gpu_of(a).sm)


_OP = define(
    "gemm_fp8_grouped(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor counts, ScalarType out_dtype)"
    " -> Tensor",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
