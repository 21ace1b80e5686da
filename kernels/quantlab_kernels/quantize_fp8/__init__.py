"""Quantization to E4M3 with scales from the data: per group of 128, per token, per 128x128 block."""

from quantlab_kernels.quantize_fp8.op import quantize_fp8_block, quantize_fp8_group, quantize_fp8_token

__all__ = ["quantize_fp8_block", "quantize_fp8_group", "quantize_fp8_token"]
