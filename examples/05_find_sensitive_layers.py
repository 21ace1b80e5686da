"""Find the layers that lose most when they are quantized, leave those alone, and let a mixture of schemes decide.

To be seen: one pass ranks all fused groups of layers; a recipe takes the worst of them out; and the same number of
groups, taken from the other end of the ranking, would have helped far less. A mixture of INT4 and FP8 at 5 bits per
weight loses far less than INT4 alone, which takes 4.1.

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


def without(left: Sequence[Effect]) -> Recipe:
    """FP8 for all but some groups."""
    return Recipe("fp8-block", tuple(Rule(pattern, "none") for effect in left for pattern in effect.match))


def loss(recipe: Recipe, folder: Path) -> Estimate:
    """KL to the original of the checkpoint that a recipe makes."""
    quantlab.quantize(MODEL, recipe, folder)
    return quantlab.evaluate(folder, baseline=MODEL, windows=8, length=256).kl


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments[0] if arguments else temporary)
        found = sensitivity(MODEL, ["fp8-block"], folder / "sensitivity.json", samples=4, fast=True)
        for rank, unit, _, kl, error, share in found.rows()[:LEFT_ALONE]:
            print(f"{rank:2} {unit:34} KL {kl} ± {error}, {share} of all")

        most = loss(without(found.effects[:LEFT_ALONE]), folder / "most")
        least = loss(without(found.effects[-LEFT_ALONE:]), folder / "least")
        print(f"\nleaving the most sensitive alone: KL {most}")
        print(f"leaving the least sensitive alone: KL {least}")

        mixture = quantlab.mix(MODEL, target_bits=5, samples=4)
        print("\n" + "\n".join(f"{what}: {value}" for what, value in mixture.rows()))
        print(f"int4-fp8 for all: KL {loss(Recipe('int4-fp8'), folder / 'int4')}")
        print(f"the mixture: KL {loss(mixture.recipe, folder / 'mixture')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
