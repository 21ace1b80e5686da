"""Compilation ahead of the first call."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.int4 import Int4Problem

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def warmup(
    shapes: Iterable[tuple[int, int]],
    *,
    tokens: Iterable[int] = TOKENS,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: torch.dtype | None = None,
    int4: torch.dtype | None = None,
) -> int:
    """Compile the run-time compiled kernels of a model's linear layers into the disk cache.

    shapes  (N, K) of the weights;  tokens  the M to be ready for, any other M takes the nearest one's kernel
    int4    None: the weights are FP8 in blocks; else they are INT4, and this is the dtype of their activations

    Returns how many kernels were wanted; those in the cache cost nothing. A kernel takes about half a second to
    compile and a model needs a dozen or two. Does nothing on a GPU that has no such kernels.
    """
    from quantlab_kernels.gemm_fp8_block import sm90
    from quantlab_kernels.gemm_int4_fp8 import sm90 as sm90_int4

    sm = present_sm()
    if int4 is not None:
        problems = (Int4Problem(m, n, k, int4, out_dtype, bias, sm=sm) for n, k in set(shapes) for m in tokens)
        return sm90_int4.warmup(problems)
    return sm90.warmup(GemmProblem(m, n, k, out_dtype, bias, sm) for n, k in set(shapes) for m in tokens)
