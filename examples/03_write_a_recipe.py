"""Say in a recipe which layers are quantized how, look at the plan, then carry it out.

To be seen: a recipe is a value that is checked when it is made; it reads from and writes to TOML without loss; the plan
tells for every tensor what would happen and why, before any weight is read; and the recipe lies beside the weights it
made.

    python examples/03_write_a_recipe.py [OUTPUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import quantlab
from quantlab.errors import UsageError
from quantlab.scheme import Recipe, Rule

MODEL = Path(__file__).parent / "tiny-llama"

# The first rule that matches a module decides; what no rule matches gets the recipe's scheme.
RECIPE = Recipe(
    "fp8-block",
    rules=(
        Rule("model.layers.0.*", "none"),  # a glob: the first block stays in bf16
        Rule(
            r"re:layers\.\d+\.mlp\.down_proj$", "none"
        ),  # a regular expression: the layers with the largest activations
    ),
)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments[0] if arguments else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "my-recipe.toml"
        file.write_text(RECIPE.to_toml(), encoding="utf-8")
        print(f"{file.name}:\n\n{file.read_text(encoding='utf-8')}")
        assert Recipe.from_toml(file) == RECIPE

        plan = quantlab.plan(MODEL, RECIPE)
        print("the plan for the first two blocks:")
        for decision in plan.decisions:
            if decision.kind == "linear" and decision.module.startswith(("model.layers.0.", "model.layers.1.")):
                scheme = decision.scheme.name if decision.scheme else "as it is"
                print(f"  {decision.module:32} {scheme:10} {decision.reason}")

        output = folder / "tiny-llama-my-recipe"
        summary = quantlab.quantize(MODEL, RECIPE, output)
        kept = output / "quantlab" / "recipe.toml"
        print(f"\n{summary.compression:.2f}x smaller; the recipe was kept in {kept.relative_to(folder)}")

        try:
            Recipe("fp8-blok")
        except UsageError as error:
            print(f"\na typing error is answered by: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
