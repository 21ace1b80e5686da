"""RMSNorm whose result comes in 16 bits and, in the same pass, as E4M3 codes in groups of 128."""

from quantlab_kernels.rmsnorm_quantize.op import rmsnorm, rmsnorm_quantize

__all__ = ["rmsnorm", "rmsnorm_quantize"]
