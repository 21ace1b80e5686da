"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.bmm_fp8 import reference
from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import OUT_DTYPES
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.ops import define, require

BACKENDS = Backends("bmm_fp8", ("sm90", "triton", "eager"), last_resort="eager")


@dataclass(frozen=True)
class Problem:
    """``out[M, H, N] = a[M, H, K]`` by a slice of each head, its rows `first` to `first + count` of `rows`.

    m, heads       extents
    rows, columns  of a head's part of the projection
    transposed     K is `columns` and N `count`; otherwise the other way round
    dtype          of activations and result
    sm             compute capability of the GPU, 90 for 9.0
    """

    m: int
    heads: int
    rows: int
    columns: int
    first: int
    count: int
    transposed: bool
    dtype: torch.dtype = torch.bfloat16
    sm: int = 90

    @property
    def k(self) -> int:
        return self.columns if self.transposed else self.count

    @property
    def n(self) -> int:
        return self.count if self.transposed else self.columns

    @property
    def flops(self) -> int:
        return 2 * self.m * self.heads * self.n * self.k

    @property
    def bytes(self) -> int:
        """Least traffic: codes, activations and results once; scales are one byte in four thousand."""
        return self.heads * (self.n * self.k + self.m * (self.n + self.k) * self.dtype.itemsize)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"M={self.m} H={self.heads} N={self.n} K={self.k} {dtype} on sm_{self.sm}"


def bmm_fp8(a: Tensor, w: Tensor, w_scale: Tensor, *, first: int, count: int, transposed: bool = False) -> Tensor:
    """``out[m, h] = a[m, h] @ W_h``, or ``@ W_h.T``: FP32 sums, each block's scale applied in float32.

    W_h [count, C] are the rows `first` to `first + count` of head h in the dequantized projection, whose R rows are
    those of one head after another. Activations are not quantized: the checkpoint's numbers, read as they are stored.

    a        [M, H, count], transposed [M, H, C]; bfloat16, float16 or float32; any strides of M and H
    w        [R, C]  float8_e4m3fn, row-major; R a multiple of H
    w_scale  [ceil(R/128), ceil(C/128)]  float32; blocks need not end where heads do
    Returns [M, H, C], transposed [M, H, count], in a's dtype, contiguous. M = 0 gives an empty tensor.

    Within the error bound of `common.bounds`. Raises RuntimeError naming the shapes that disagree.
    """
    return _OP(a, w, w_scale, first, count, transposed)


def check(a: Tensor, w: Tensor, w_scale: Tensor, first: int, count: int, transposed: bool) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    require(
        a.dim() == 3 and a.dtype in OUT_DTYPES,
        lambda: f"bmm_fp8: a is {a.dtype} {tuple(a.shape)}, needs floats of shape [M, H, K]",
    )
    require(
        w.dim() == 2 and w.dtype == torch.float8_e4m3fn and w.shape[0] % a.shape[1] == 0,
        lambda: (
            f"bmm_fp8: w is {w.dtype} {tuple(w.shape)}, needs float8_e4m3fn [R, C] with as many rows for each of "
            f"{a.shape[1]} heads"
        ),
    )
    blocks = (w.shape[0] + 127) // 128, (w.shape[1] + 127) // 128
    require(
        w_scale.dtype == torch.float32 and tuple(w_scale.shape) == blocks,
        lambda: f"bmm_fp8: w_scale is {w_scale.dtype} {tuple(w_scale.shape)}, needs float32 {blocks}",
    )
    rows = w.shape[0] // a.shape[1]
    require(
        0 <= first < first + count <= rows,
        lambda: f"bmm_fp8: rows {first} to {first + count} of a head, which has {rows}",
    )
    k = w.shape[1] if transposed else count
    require(a.shape[2] == k, lambda: f"bmm_fp8: a is {tuple(a.shape)}, needs K = {k}")


def problem_of(a: Tensor, w: Tensor, first: int, count: int, transposed: bool) -> Problem:
    """The problem that these operands on a GPU pose."""
    m, heads, _ = a.shape
    rows, columns = w.shape
    return Problem(m, heads, rows // heads, columns, first, count, transposed, a.dtype, gpu_of(a).sm)


def _fake(a: Tensor, w: Tensor, w_scale: Tensor, first: int, count: int, transposed: bool) -> Tensor:
    check(a, w, w_scale, first, count, transposed)
    return a.new_empty((a.shape[0], a.shape[1], count if transposed else w.shape[1]))


def _cpu(a: Tensor, w: Tensor, w_scale: Tensor, first: int, count: int, transposed: bool) -> Tensor:
    check(a, w, w_scale, first, count, transposed)
    return reference.bmm(a, w, w_scale, first, count, transposed, torch.float32).to(a.dtype)


def _cuda(a: Tensor, w: Tensor, w_scale: Tensor, first: int, count: int, transposed: bool) -> Tensor:
    out = _fake(a, w, w_scale, first, count, transposed)
    if out.numel() == 0:
        return out
    if a.stride(2) != 1:
        a = a.contiguous()
    problem = problem_of(a, w, first, count, transposed)
    backend = BACKENDS.select(problem)
    with device_of(a):
        backend.launch(problem, a, w.contiguous(), w_scale.contiguous(), out, backend.config(problem))
    return out


_OP = define(
    "bmm_fp8(Tensor a, Tensor w, Tensor w_scale, int first, int count, bool transposed) -> Tensor",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
