"""Where things are kept that can be made again: compiled kernels, last hidden states of baselines."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Folder of one kind, which may not exist yet: below ``$QUANTLAB_CACHE``, else ``quantlab`` under
    ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if given := os.environ.get("QUANTLAB_CACHE"):
        return Path(given) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantlab" / kind
