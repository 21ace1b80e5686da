"""cuBLASLt through PyTorch: block-scaled FP8 on Hopper only, with exactly these operands (VEC128 by BLK128x128).

It wants the weight's scales transposed, K running fastest, each column padded to 16 bytes; a row-major b_scale whose
K/128 is a multiple of 4 already is that, any other is padded by a small copy at each call.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Mendable
from quantlab_kernels.common.gemm import GemmProblem, round_up


def supports(problem: GemmProblem) -> str | None:
    reason = able(problem)
    if reason is None and problem.m < 128 and importlib.util.find_spec("triton"):
        return f"Triton is faster below M = 128, this is M = {problem.m}"
    return reason


def able(problem: GemmProblem) -> str | None:
    """Why it cannot run the problem at all, or None; `supports` also leaves aside what others do better."""
    if problem.sm != 90:
        return f"cuBLASLt has block-scaled FP8 for sm_90 only, the GPU is sm_{problem.sm}"
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return Mendable(f"torch {torch.__version__} pads the scales wrongly; needs torch 2.10")
    if problem.m % 4:
        return f"needs M in multiples of 4, this is M = {problem.m}"
    if problem.n % 16 or problem.k % 128:
        return f"needs N in multiples of 16 and K of 128, this is N = {problem.n}, K = {problem.k}"
    if problem.bias and not problem.bias == problem.out_dtype == torch.bfloat16:
        return f"adds a bfloat16 bias to a bfloat16 result only, this is {problem.bias} to {problem.out_dtype}"
    return None


def config(problem: GemmProblem) -> None:
    return None


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: None
) -> None:
    recipe = torch.nn.functional.ScalingType
    groups = b_scale.shape[1]
    padded = torch.nn.functional.pad(b_scale, (0, round_up(groups, 4) - groups))
    # What `torch.nn.functional.scaled_mm` calls, which has no `out`.
    torch.ops.aten._scaled_mm_v2.out(
        a, b.t(), [a_scale], [recipe.BlockWise1x128.value], [], [padded.t()], [recipe.BlockWise128x128.value], [],
        bias, out.dtype, out=out,
    )  # fmt: skip
