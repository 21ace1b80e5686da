"""cuBLASLt and CUTLASS through PyTorch: row-wise scales, with the slow accumulation that promotes to float32.

`use_fast_accum=True` is 10 to 12 % faster and wrong: its sums never leave the tensor core's 14 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.gemm import GemmProblem


def supports(problem: GemmProblem) -> str | None:
    reason = able(problem)
    if reason is None and problem.m < 128:
        return f"Triton is faster below M = 128, this is M = {problem.m}"
    return reason


def able(problem: GemmProblem) -> str | None:
    """Why it cannot run the problem at all, or None; `supports` also leaves aside what others do better."""
    if problem.sm < 90:
        return f"row-wise scaling needs sm_90 or newer, the GPU is sm_{problem.sm}"
    if problem.n % 16 or problem.k % 16:
        return f"needs N and K in multiples of 16, this is N = {problem.n}, K = {problem.k}"
    if problem.bias and not problem.bias == problem.out_dtype == torch.bfloat16:
        return f"adds a bfloat16 bias to a bfloat16 result only, this is {problem.bias} to {problem.out_dtype}"
    return None


def config(problem: GemmProblem) -> None:
    return None


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: None
) -> None:
    torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), bias=bias, out_dtype=out.dtype, use_fast_accum=False, out=out)
