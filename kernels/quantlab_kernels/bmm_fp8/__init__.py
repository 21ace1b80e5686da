"""Batched GEMM of 16-bit activations with the heads' slices of an FP8 projection, in either direction."""

from quantlab_kernels.bmm_fp8.op import bmm_fp8

__all__ = ["bmm_fp8"]
