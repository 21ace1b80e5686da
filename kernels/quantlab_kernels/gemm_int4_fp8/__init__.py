"""GEMM of E4M3 activations with an INT4 weight in groups of 128."""

from quantlab_kernels.gemm_int4_fp8.op import gemm_int4_fp8

__all__ = ["gemm_int4_fp8"]
