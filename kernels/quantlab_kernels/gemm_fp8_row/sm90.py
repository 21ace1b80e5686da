"""Hopper backend: the kernel of `gemm_fp8_block` built with ROW, whose scales wait for the finished sums."""

from __future__ import annotations

from dataclasses import replace

from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.gemm_fp8_block import sm90
from quantlab_kernels.gemm_fp8_block.sm90 import launch
from quantlab_kernels.gemm_fp8_block.sm90_configs import Config

__all__ = ["able", "config", "launch", "supports"]

_MOST = 512  # tokens; at 1024 cuBLAS is as fast, at 4096 2 to 8 % faster


def supports(problem: GemmProblem) -> str | None:
    reason = able(problem)
    if reason is None and problem.m > _MOST:
        return f"cuBLAS is as fast or faster above M = {_MOST}, this is M = {problem.m}"
    return reason


def able(problem: GemmProblem) -> str | None:
    """Why it cannot run the problem at all, or None; `supports` also leaves aside what others do as well."""
    return sm90.supports(problem)


@remembered
def config(problem: GemmProblem) -> Config:
    """The tiles of `gemm_fp8_block`: the loop is the same, but for the scales."""
    return replace(sm90.config(problem), row=1)
