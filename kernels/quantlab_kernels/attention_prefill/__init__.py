"""Attention over many queries at once with 8-bit products."""

from quantlab_kernels.attention_prefill.op import attention_8bit, attention_prefill

__all__ = ["attention_8bit", "attention_prefill"]
