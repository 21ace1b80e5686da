"""FP8 GEMM with a scale per token and a scale per output channel."""

from quantlab_kernels.gemm_fp8_row.op import gemm_fp8_row

__all__ = ["gemm_fp8_row"]
