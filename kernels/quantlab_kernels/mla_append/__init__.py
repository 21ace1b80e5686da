"""Normalizing, turning, quantizing new latents and writing them into a packed cache, in one launch."""

from quantlab_kernels.mla_append.op import mla_append, mla_step, mla_turn

__all__ = ["mla_append", "mla_step", "mla_turn"]
