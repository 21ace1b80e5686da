"""GEMM of 16-bit activations with an INT4 weight in groups of 128."""

from quantlab_kernels.gemm_int4.op import gemm_int4

__all__ = ["gemm_int4"]
