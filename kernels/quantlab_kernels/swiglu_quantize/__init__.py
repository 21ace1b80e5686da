"""silu(gate) * up, quantized to E4M3 in groups of 128 as it is computed."""

from quantlab_kernels.swiglu_quantize.op import swiglu_quantize

__all__ = ["swiglu_quantize"]
