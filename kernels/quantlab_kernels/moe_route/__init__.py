"""Which experts a token goes to, and with what weights."""

from quantlab_kernels.moe_route.op import Rule, moe_route

__all__ = ["Rule", "moe_route"]
