"""Quantizing new keys and values and writing them into a packed cache, in one launch."""

from quantlab_kernels.kv_append.op import kv_append

__all__ = ["kv_append"]
