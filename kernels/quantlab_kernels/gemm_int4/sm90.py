"""Hopper backend: the kernel of `gemm_int4_fp8`, built for 16-bit activations."""

from __future__ import annotations

from torch import Tensor

from quantlab_kernels.gemm_int4_fp8 import sm90
from quantlab_kernels.gemm_int4_fp8.sm90_configs import Config

supports = sm90.supports
config = sm90.config
warmup = sm90.warmup


def launch(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config) -> None:
    """out [M, N] in the dtype of x; see `op.gemm_int4` for the layouts."""
    sm90.launch(x, None, b, b_scale, bias, out, config)
