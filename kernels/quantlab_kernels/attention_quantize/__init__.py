"""Queries, keys and values as the 8-bit attention kernels read them: rotated, centred, INT8 or E4M3."""

from quantlab_kernels.attention_quantize.op import Quantized, attention_quantize

__all__ = ["Quantized", "attention_quantize"]
