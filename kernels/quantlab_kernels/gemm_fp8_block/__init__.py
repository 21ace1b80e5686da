"""FP8 GEMM with 1x128 activation scales and 128x128 weight scales."""

from quantlab_kernels.gemm_fp8_block.op import gemm_fp8_block

__all__ = ["gemm_fp8_block"]
