"""Attention of a few queries over a packed KV cache."""

from quantlab_kernels.attention_decode.op import attention_decode

__all__ = ["attention_decode"]
