"""Triton backend: sm_80 and newer, a weight in words, any M and N. The kernel is `common.triton_int4`."""

from __future__ import annotations

from torch import Tensor

from quantlab_kernels.common import triton_int4
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm_configs import Config
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.int4 import Int4Problem

supports = triton_int4.supports


@remembered
def config(problem: Int4Problem) -> Config:
    return triton_int4.config("gemm_int4_fp8", problem)


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config
) -> None:
    triton_int4.launch(a, a_scale, b, b_scale, bias, out, config, native=gpu_of(out).sm >= 89)
