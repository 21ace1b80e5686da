"""Mixed precision: the scheme of each fused group that loses least at a given size, or is smallest at a given loss.

The loss of an assignment is predicted as the sum of what each group does alone (`sensitivity`): exact to first order,
because the errors of different groups are nearly uncorrelated. What to choose is then a knapsack problem with one
choice per group, solved exactly but for the grid of sizes. The prediction is checked: the model runs once with all
groups quantized as assigned, and that measured KL decides where a limit was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantlab import preflight
from quantlab.checkpoint import WEIGHT
from quantlab.errors import UsageError
from quantlab.preflight import Plan
from quantlab.scheme import Recipe, Rule
from quantlab.scoring import Estimate
from quantlab.sensitivity import Run, open_model, schemes_named, tokens_of
from quantlab.simulate import units_of
from quantlab.summary import Progress, Shown, Table

GRID = 1 << 16  # sizes between the least and the most are told apart in so many steps
ATTEMPTS = 5  # at meeting a limit of the measured KL
DEFAULT_SCHEMES = ("int4-fp8", "fp8-dynamic", "none")


@dataclass(frozen=True)
class Choice:
    """One way to store a unit: scheme ("none" leaves it), bytes on disk, KL in nats per token when it alone has it."""

    scheme: str
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Mixture(Shown):
    """Result of `mix`.

    recipe     what `quantize` takes
    bits       stored per weight, scales included, over all weights that could be quantized
    predicted  sum of the KLs of the groups alone, nats per token
    measured   KL of all together, on the same tokens
    assigned   unit -> scheme
    """

    recipe: Recipe
    bits: float
    predicted: float
    measured: Estimate
    assigned: dict[str, str]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"recipe": self.recipe.to_dict()}

    def tables(self) -> list[Table]:
        return [("schemes of the groups of layers", ("", ""), [*self.rows()])]

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for people."""
        error = "" if self.measured.error is None else f" +- {self.measured.error:.1g}"
        counts = {name: list(self.assigned.values()).count(name) for name in dict.fromkeys(self.assigned.values())}
        return [
            ("bits per weight", f"{self.bits:.2f}"),
            ("groups", ", ".join(f"{n} {name}" for name, n in counts.items())),
            ("KL, predicted", f"{self.predicted:.3g}"),
            ("KL, measured", f"{self.measured.value:.3g}{error}"),
        ]


def mix(
    model: str | Path,
    *,
    target_bits: float | None = None,
    max_kl: float | None = None,
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    ignore: Sequence[str] = (),
    calibration: str = "bundled",
    samples: int = 8,
    length: int = 256,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Mixture:
    """Find the best assignment of `schemes` to the fused groups of a model; "none" among them leaves groups alone.

    target_bits  most bits per weight, scales included, over the weights that can be quantized
    max_kl       or: highest KL to the original, nats per token, measured on the windows used here
    ignore       patterns of modules that stay as they are and count for nothing

    Raises UsageError where not exactly one of the two is given, and for a size or a loss that no assignment reaches.
    """
    if (target_bits is None) == (max_kl is None):
        raise UsageError("give either target_bits or max_kl: a size or a loss")
    if not (target_bits or max_kl or 0) > 0:
        what = f"target_bits = {target_bits}" if target_bits is not None else f"max_kl = {max_kl}"
        raise UsageError(f"{what}: must be more than 0")
    quantizing = schemes_named([name for name in schemes if name != "none"])
    Recipe(quantizing[0], tuple(Rule("*", name) for name in quantizing))  # refuses what does not mix
    source = open_model(model, trust_remote_code, revision)
    kept = tuple(Rule(pattern, "none") for pattern in ignore)
    plans = {
        name: preflight.plan(source, Recipe(name, kept), trust_remote_code=trust_remote_code) for name in quantizing
    }
    if target_bits is not None:
        _check_target(target_bits, plans, "none" in schemes)
    tokens = tokens_of(source, calibration, samples, length, trust_remote_code)
    run = Run(source, plans, tokens, device, trust_remote_code, progress)
    choices = choices_of(plans, {(e.unit, e.scheme): e.kl.value for e in run.estimated()}, "none" in schemes)
    elements = {unit.name: unit.elements for plan in plans.values() for unit in units_of(plan)}
    weights = sum(elements[name] for name in choices)

    def assignment(picks: list[int]) -> dict[str, Choice]:
        return {name: options[pick] for (name, options), pick in zip(choices.items(), picks, strict=True)}

    if target_bits is not None:
        picked = assignment(allocate(list(choices.values()), budget=int(target_bits * weights / 8)))
        measured = run.together({name: choice.scheme for name, choice in picked.items()})
    else:
        assert max_kl is not None
        picked, measured = _within(run, lambda limit: assignment(allocate(list(choices.values()), limit=limit)), max_kl)
    assigned = {name: choice.scheme for name, choice in picked.items()}
    return Mixture(
        recipe_of(assigned, plans, kept),
        8 * sum(choice.nbytes for choice in picked.values()) / weights,
        sum(choice.kl for choice in picked.values()),
        measured,
        assigned,
        run.settings() | {"data": calibration, "target_bits": target_bits, "max_kl": max_kl},
    )


def _check_target(target_bits: float, plans: dict[str, Plan], leave: bool) -> None:
    """Raise UsageError for a size that no assignment has, before any work."""
    units = {unit.name: unit.elements for plan in plans.values() for unit in units_of(plan)}
    choices = choices_of(plans, {(unit, scheme): 0.0 for unit in units for scheme in plans}, leave)
    weights, given = sum(units.values()), f"target_bits = {target_bits:g}"
    least, most = (8 * sum(f(c.nbytes for c in item) for item in choices.values()) / weights for f in (min, max))
    if target_bits < least:
        raise UsageError(f"{given}: {', '.join(plans)} take {least:.3f} bits per weight at least; allow more bits")
    if leave and target_bits >= most:
        raise UsageError(f"{given}: the model has {most:g}, so nothing would be quantized; ask for fewer")


def _within(
    run: Run, assignment: Callable[[float], dict[str, Choice]], max_kl: float
) -> tuple[dict[str, Choice], Estimate]:
    """The smallest assignment found whose measured KL is at most `max_kl`: the limit on the prediction moves by the
    ratio of the two."""
    limit, best = max_kl, None
    for _ in range(ATTEMPTS):
        picked = assignment(limit)
        if all(choice.scheme == "none" for choice in picked.values()):
            break
        measured = run.together({name: choice.scheme for name, choice in picked.items()})
        size = sum(choice.nbytes for choice in picked.values())
        if measured.value <= max_kl and (best is None or size < best[0]):
            best = size, picked, measured
        if 0.9 * max_kl <= measured.value <= max_kl:
            break
        limit *= 0.98 * max_kl / max(measured.value, 0.1 * max_kl)
    if best is None:
        raise UsageError(f"a KL of {max_kl:g} is less than quantizing any group costs; allow more with --max-kl")
    return best[1], best[2]


def choices_of(plans: dict[str, Plan], effects: dict[tuple[str, str], float], leave: bool) -> dict[str, list[Choice]]:
    """Unit -> ways to store it: every scheme whose effect is known and, with `leave`, as it is at no loss."""
    found: dict[str, list[Choice]] = {}
    for scheme, plan in plans.items():
        sizes = {d.tensor.removesuffix(WEIGHT): (preflight.bytes_after(d), d.info.nbytes) for d in plan.quantized}
        for unit in units_of(plan):
            if (unit.name, scheme) in effects:
                after, before = (sum(column) for column in zip(*map(sizes.__getitem__, unit.modules), strict=True))
                options = found.setdefault(unit.name, [Choice("none", before, 0.0)] if leave else [])
                options.append(Choice(scheme, after, max(effects[unit.name, scheme], 0.0)))
    return found


def allocate(
    choices: Sequence[Sequence[Choice]], *, budget: int | None = None, limit: float | None = None
) -> list[int]:
    """Index of the choice for each item: least sum of KL within `budget` bytes, or fewest bytes with a sum of at most
    `limit`. Dynamic programming over sizes; a size is rounded up to the grid, so the budget holds exactly.

    Raises UsageError where nothing fits.
    """
    least = [min(choice.nbytes for choice in item) for item in choices]
    most = sum(max(choice.nbytes for choice in item) for item in choices)
    free = budget is None or budget >= most  # then rounding up must not keep out the largest assignment
    spare = (most if budget is None else min(budget, most)) - sum(least)
    if spare < 0:
        raise UsageError(
            f"the smallest assignment takes {sum(least)} bytes, the target allows {budget}; allow more bits"
        )
    step = -(-spare // GRID) or 1
    best, picks = torch.zeros(spare // step + 1 + free * len(choices), dtype=torch.float64), []
    for item, floor in zip(choices, least, strict=True):
        rows = [_shifted(best, _steps(choice, floor, step)) + choice.kl for choice in item]
        best, pick = torch.stack(rows).min(dim=0)
        picks.append(pick)
    cell = len(best) - 1
    if limit is not None:
        fitting = (best <= limit).nonzero()
        if not len(fitting):
            raise UsageError(f"no assignment has a KL of {limit:g} or less; allow more, or add the scheme none")
        cell = int(fitting[0])
    chosen = []
    for item, floor, pick in zip(reversed(choices), reversed(least), reversed(picks), strict=True):
        chosen.append(int(pick[cell]))
        cell -= _steps(item[chosen[-1]], floor, step)
    return chosen[::-1]


def _steps(choice: Choice, floor: int, step: int) -> int:
    return -(-(choice.nbytes - floor) // step)


def _shifted(best: torch.Tensor, cells: int) -> torch.Tensor:
    """What is best with `cells` less to spend; infinite where there is not so much."""
    moved = torch.full_like(best, torch.inf)
    if cells < len(best):
        moved[cells:] = best[: len(best) - cells]
    return moved


def recipe_of(assigned: dict[str, str], plans: dict[str, Plan], kept: tuple[Rule, ...] = ()) -> Recipe:
    """The recipe that gives each unit its scheme: the one with the most weights for all, rules for the others, after
    those that keep modules out."""
    units = {unit.name: unit for plan in plans.values() for unit in units_of(plan)}
    weights: dict[str, int] = dict.fromkeys(assigned.values(), 0)
    for name, scheme in assigned.items():
        weights[scheme] += units[name].elements
    common = max(weights, key=lambda scheme: weights[scheme] if scheme != "none" else -1)
    rules = [Rule(p, scheme) for name, scheme in assigned.items() if scheme != common for p in units[name].patterns]
    return Recipe(common, (*kept, *rules))
