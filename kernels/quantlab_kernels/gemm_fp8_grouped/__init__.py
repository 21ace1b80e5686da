"""FP8 GEMM over experts: rows sorted by expert, each expert with its own weight; the counts stay on the device."""

from quantlab_kernels.gemm_fp8_grouped.op import gemm_fp8_grouped

__all__ = ["gemm_fp8_grouped"]
