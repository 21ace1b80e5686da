"""Rotary position embedding of queries and keys in one launch, rounded exactly as transformers rounds it."""

from quantlab_kernels.rope.op import rope

__all__ = ["rope"]
