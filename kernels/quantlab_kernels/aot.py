"""Compilation ahead of the first call."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.int4 import Int4Problem, scales_by_group

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def warmup(
    shapes: Iterable[tuple[int, int]],
    *,
    tokens: Iterable[int] = TOKENS,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: torch.dtype | None = None,
    int4: torch.dtype | None = None,
    experts: int = 0,
    choices: int = 1,
) -> int:
    """Compile the run-time compiled kernels of a model's linear layers, or of its experts, into the disk cache.

    shapes  (N, K) of the weights;  tokens  the M to be ready for, any other M takes the nearest one's kernel
    int4    None: the weights are FP8 in blocks; else they are INT4, and this is the dtype of their activations
    experts  0: linear layers; else as many weights of each shape, of which a token meets `choices` (INT4 only)

    Returns how many kernels were wanted; those in the cache cost nothing. A kernel takes about half a second to
    compile and a model needs a dozen or two. Does nothing on a GPU that has no such kernels.
    """
    from quantlab_kernels.gemm_fp8_block import sm90, sm90_few
    from quantlab_kernels.gemm_int4_fp8 import sm90 as sm90_int4
    from quantlab_kernels.gemm_int4_fp8 import sm90_few as int4_few

    sm, fp8 = present_sm(), int4 == torch.float8_e4m3fn
    if experts:
        if int4 is None:
            raise ValueError("warmup: experts are compiled ahead for INT4 weights only; give the dtype of int4")
        from quantlab_kernels.gemm_int4_grouped import sm90 as sm90_grouped

        return sm90_grouped.warmup(
            Int4Problem(
                m * choices, n, k, int4, out_dtype, grouped=fp8 and scales_by_group(m * choices // experts), sm=sm,
                experts=experts,
            )
            for n, k in set(shapes) for m in tokens
        )  # fmt: skip
    if int4 is None:
        problems = [GemmProblem(m, n, k, out_dtype, bias, sm) for n, k in set(shapes) for m in tokens]
        return sm90_few.warmup(problems) + sm90.warmup(p for p in problems if sm90_few.supports(p) is not None)
    wanted = [
        Int4Problem(m, n, k, int4, out_dtype, bias, grouped=fp8 and scales_by_group(m), sm=sm)
        for n, k in set(shapes) for m in tokens
    ]  # fmt: skip
    return int4_few.warmup(wanted) + sm90_int4.warmup(p for p in wanted if int4_few.supports(p) is not None)
