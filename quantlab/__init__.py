"""Quantize Hugging Face models and run them fast: after this import, transformers runs quantized checkpoints on our
layers.

The import itself loads neither torch nor transformers; the names below load what they need when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from quantlab import hf

_HOMES = {
    "load": "hf",
    "pipeline": "hf",
    "enable": "hf",
    "plan": "pipeline",
    "quantize": "pipeline",
    "evaluate": "evaluate",
    "mix": "mixed",
    "verify": "verify",
    "Recipe": "scheme",
    "Scheme": "scheme",
}

__all__ = ["Recipe", "Scheme", "enable", "evaluate", "load", "mix", "pipeline", "plan", "quantize", "verify"]


class _Package(ModuleType):
    """Importing a submodule sets an attribute of its name here; where a function has that name, the function stays:
    `quantlab.pipeline(...)` works after `from quantlab.pipeline import quantize`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"quantlab.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


sys.modules[__name__].__class__ = _Package
hf.enable()
