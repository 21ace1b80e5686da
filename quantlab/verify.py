"""Is a checkpoint what its config says it is?"""

from __future__ import annotations

from pathlib import Path


def verify_weights(folder: Path) -> list[str]:
    """One line for each thing that is wrong with the weights in a folder."""
    return []
