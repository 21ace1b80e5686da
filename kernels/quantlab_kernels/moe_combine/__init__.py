"""What the experts found, back in token order: their weighted sum."""

from quantlab_kernels.moe_combine.op import moe_combine

__all__ = ["moe_combine"]
