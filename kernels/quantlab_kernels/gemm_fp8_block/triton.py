"""Triton backend: sm_80 and newer, any M and N. The kernel is `common.triton_gemm`."""

from __future__ import annotations

from torch import Tensor

from quantlab_kernels.common import triton_gemm
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.gemm_configs import Config, choose
from quantlab_kernels.common.hardware import gpu_of


def supports(problem: GemmProblem) -> str | None:
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if problem.k % 128:
        return f"K = {problem.k} is not a multiple of 128; pad the weight"
    return None


@remembered
def config(problem: GemmProblem) -> Config:
    return choose("gemm_fp8_block", problem)


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config
) -> None:
    native = gpu_of(out).sm >= 89
    triton_gemm.launch(a, a_scale, b, b_scale, bias, out, config, blocked=True, native=native)
