"""What a plan tells its reader beside the decisions: what most weights stay for, and who loads the result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantlab import kinds
from quantlab.checkpoint import WEIGHT
from quantlab.scheme import Recipe
from quantlab.source import Source

if TYPE_CHECKING:
    from quantlab.architecture import Architecture
    from quantlab.preflight import Decision


def on(decisions: list[Decision], source: Source, recipe: Recipe, architecture: Architecture | None) -> Iterator[str]:
    """One line each."""
    yield from _what_stays(decisions, source, recipe)
    if architecture is not None:
        yield from _who_loads_it(decisions, architecture)


def _what_stays(decisions: list[Decision], source: Source, recipe: Recipe) -> Iterator[str]:
    by_design = ("embedding", "output head", "recipe")
    other = [d for d in decisions if not d.scheme and len(d.info.shape) > 1 and not d.reason.startswith(by_design)]
    done, lost = sum(d.info.nbytes for d in decisions if d.scheme), sum(d.info.nbytes for d in other)
    if lost > done:
        worst = Counter()  # type: ignore[var-annotated]
        for decision in other:
            worst[decision.reason or "no known reason"] += decision.info.nbytes
        share = 100 * lost / source.weight_bytes
        yield f"most weights stay in 16 bits: {share:.0f} % of the bytes, mainly because: {worst.most_common(1)[0][0]}"
    if recipe.calibration is None and recipe.is_int4:
        yield "INT4 weights are rounded without data; `--effort fast` loses three times less, with text of the package"
    if any(d.scheme and d.scheme.name == "int4-fp8" for d in decisions):
        yield "vLLM runs INT4 weights with FP8 activations on Hopper only; `quantlab convert --to int4` serves the rest"
    shaped = sum(d.reason.startswith("shape") for d in decisions)
    yield from (f"{shaped} layers stay in 16 bits because of their shape; {how}" for how in about_shapes(decisions))
    fused = [d for d in decisions if d.reason.startswith("fused by engines")]
    if fused:
        yield f"{len(fused)} layers stay in 16 bits because engines fuse them with a layer that does"
    for rule in recipe.rules:
        asked = [d for d in decisions if d.kind in kinds.STAY and d.scheme is None and rule.matches(d.module)]
        exact = [d for d in asked if rule.scheme != "none" and "*" not in rule.match and len(d.info.shape) == 2]
        if exact:
            yield f"the recipe wants {exact[0].module} as {rule.scheme}, but it stays ({exact[0].reason})"
    if source.lost_links:
        yield f"not carried over, links that lead nowhere or back: {', '.join(map(str, source.lost_links[:5]))}"
    if source.left_out:
        yield f"not carried over, weights that are not the model's: {', '.join(map(str, source.left_out[:5]))}"


def about_shapes(decisions: list[Decision]) -> Iterator[str]:
    """What to do about layers whose shape does not fit: one scheme takes smaller multiples than the others."""
    misfits = [d for d in decisions if d.scheme is None and d.reason.startswith("shape")]
    if any(math.gcd(*d.info.shape[-2:]) % kinds.ENGINE_ALIGNMENT == 0 for d in misfits):
        mixed = any(d.scheme and d.scheme.layout != "fp8" for d in decisions)  # fp8-block mixes with nothing
        how = "name them in a recipe with that scheme" if mixed else "use --scheme fp8-dynamic"
        yield f"fp8-dynamic takes shapes in multiples of {kinds.ENGINE_ALIGNMENT}: {how}"


def _who_loads_it(decisions: list[Decision], architecture: Architecture) -> Iterator[str]:
    """What nothing loads as it should be, what transformers loads with us alone, and what without us alone."""
    missing = architecture.missing
    if missing:
        first = f"{missing[0]}{', ...' if missing[1:] else ''}"
        yield f"{len(missing)} parameters of the model are not in the checkpoint ({first}); is it whole?"
    quantized = {architecture.modules.get(d.tensor, "") for d in decisions if d.scheme and d.kind == "expert"}
    why = next((why for path, why in architecture.foreign.items() if path in quantized), None)
    if why is not None:
        yield f"quantlab leaves the result to transformers and engines: {why}; leave the experts with --ignore"
    apart = (d.parts[0][0] for d in decisions if d.stack is None and d.parts and len(d.info.shape) == 3)
    if not architecture.unstacked and any(name + WEIGHT in architecture.ours for name in apart):
        yield "transformers loads these experts after `import quantlab` alone; without, it would run random ones"
    stacks = [d.stack for d in decisions if d.stack is not None]
    if stacks:
        lie = "; as they lie 5.17 loads them, 5.23 refuses to" if any(stack.transposed for stack in stacks) else ""
        yield f"without quantlab transformers runs these experts on GPUs only, by kernels from its hub{lie}"
    if any(d.scheme and d.scheme.layout == "pack-quantized" for d in decisions):
        yield from _merged_beside_int4(decisions, architecture)


def _merged_beside_int4(decisions: list[Decision], architecture: Architecture) -> Iterator[str]:
    """transformers takes every weight that it merges with others, quantized or not, for one of the scheme's."""
    merged = [d.module for d in decisions if d.scheme is None and d.tensor.endswith(WEIGHT)]
    merged = [m for m in merged if m + WEIGHT in architecture.kinds and m + WEIGHT not in architecture.shapes]
    if merged:
        yield (
            "without quantlab transformers cannot load this: beside INT4 weights it merges none of 16 bits, and "
            f"{len(merged)} stay ({merged[0]}{', ...' if merged[1:] else ''}); fp8-dynamic has no such limit"
        )
