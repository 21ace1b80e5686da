"""INT4 GEMM over experts: rows sorted by expert, each expert with its own weight; the counts stay on the device."""

from quantlab_kernels.gemm_int4_grouped.op import gemm_int4_grouped

__all__ = ["gemm_int4_grouped"]
