"""Rows for the experts: tokens quantized once and written to every place where an expert reads them."""

from quantlab_kernels.moe_dispatch.op import moe_dispatch

__all__ = ["moe_dispatch"]
