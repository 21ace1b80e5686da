"""Absorbed attention of a few queries over a packed cache of latents."""

from quantlab_kernels.mla_decode.op import mla_decode

__all__ = ["mla_decode"]
