"""Hopper backend for few tokens and small weights: that of `gemm_fp8_block` built with ROW."""

from __future__ import annotations

from dataclasses import replace

from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.gemm_fp8_block import sm90_few
from quantlab_kernels.gemm_fp8_block.sm90_few import Config, able, launch, supports

__all__ = ["able", "config", "launch", "supports"]


@remembered
def config(problem: GemmProblem) -> Config:
    """The configurations of `gemm_fp8_block`: the loop is the same, but for the scales."""
    return replace(sm90_few.config(problem), row=1)
