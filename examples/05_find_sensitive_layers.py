"""Find the layers that lose most when they are quantized, and leave those alone.

To be seen: one pass ranks all fused groups of layers; a recipe takes the worst of them out; and the same number of
groups, taken from the other end of the ranking, would have helped far less.

    python examples/05_find_sensitive_layers.py [OUTPUT]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import quantlab
from quantlab.scheme import Recipe, Rule
from quantlab.scoring import Estimate
from quantlab.sensitivity import Effect, sensitivity

MODEL = Path(__file__).parent / "tiny-llama"
LEFT_ALONE = 5  # of 20 groups


def loss(left: Sequence[Effect], folder: Path) -> Estimate:
    """KL to the original of a checkpoint in which some groups are not quantized."""
    rules = tuple(Rule(pattern, "none") for effect in left for pattern in effect.match)
    quantlab.quantize(MODEL, Recipe("fp8-block", rules), folder)
    return quantlab.evaluate(folder, baseline=MODEL, windows=8, length=256).kl


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments[0] if arguments else temporary)
        found = sensitivity(MODEL, ["fp8-block"], folder / "sensitivity.json", samples=4, fast=True)
        for rank, unit, _, kl, error, share in found.rows()[:LEFT_ALONE]:
            print(f"{rank:2} {unit:34} KL {kl} ± {error}, {share} of all")

        most = loss(found.effects[:LEFT_ALONE], folder / "most")
        least = loss(found.effects[-LEFT_ALONE:], folder / "least")
        print(f"\nleaving the most sensitive alone: KL {most}")
        print(f"leaving the least sensitive alone: KL {least}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
