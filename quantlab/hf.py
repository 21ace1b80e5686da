"""All contact with transformers: what it would build, our layers inside its models, loading."""

from __future__ import annotations

from quantlab.architecture import Architecture, architecture

__all__ = ["Architecture", "architecture"]
