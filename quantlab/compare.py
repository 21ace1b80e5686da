"""Two evaluations side by side: what changed, and whether the change is more than chance.

Both runs scored the same windows, so differences are taken window by window: the hard windows are hard for both, and
the error of the mean difference is far smaller than that of either mean. Combining the two errors as if they were
independent would hide most real changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantlab.checkpoint import OURS
from quantlab.errors import UsageError
from quantlab.scoring import Estimate, estimate, exponential
from quantlab.summary import Shown, Table

MEASURES = {"nll": "perplexity", "kl": "KL to the baseline (nats)", "top1": "top-1 agreement"}
AGAINST_BASELINE = ("kl", "top1")
# Settings that have to agree. Not the texts' paths: what they hold may be the same, and the hash tells.
SAME = ("length", "windows", "tokens_sha256", "dtype")


@dataclass(frozen=True)
class Difference:
    """One measure of both runs.

    change   B - A, of perplexity B / A, with its standard error
    sigmas   how many standard errors B is from A; None where the error is not known, or nothing differs at all
    """

    measure: str
    a: float
    b: float
    change: Estimate
    sigmas: float | None


@dataclass(frozen=True)
class Comparison(Shown):
    """Result of `compare`. notes: what differs between the runs and may explain a part of it."""

    a: str
    b: str
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> list[Table]:
        header = ("measure", "A", "B", "change", "standard error", "in standard errors")
        return [(f"A: {self.a}\nB: {self.b}", header, self.rows())]

    def rows(self) -> list[tuple[Any, ...]]:
        """(measure, A, B, change, standard error, sigmas) for people."""
        found: list[tuple[Any, ...]] = []
        for d in self.differences:
            error = "" if d.change.error is None else f"{d.change.error:.2g}"
            sigmas = "" if d.sigmas is None else f"{d.sigmas:+.1f}"
            change = round(d.change.value, 9) + 0.0  # what sums leave of a difference of zero
            found.append((d.measure, f"{d.a:.5g}", f"{d.b:.5g}", f"{change:.5g}", error, sigmas))
        return found


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare two results of `quantlab eval`: folders of checkpoints, or files.

    Raises UsageError where there is no result, and where texts, windows, dtypes or baselines differ: such numbers say
    nothing about each other.
    """
    first, second = _read(Path(a)), _read(Path(b))
    _check(str(a), first, str(b), second)
    names = [name for name in MEASURES if name in first["windows"] and name in second["windows"]]
    differences = [*(_paired(name, first, second) for name in names), *_tasks(first["tasks"], second["tasks"])]
    return Comparison(str(a), str(b), tuple(differences), tuple(_notes(first, second)))


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        inside = (path / OURS / "eval.json", path / "eval.json")
        path = next((file for file in inside if file.is_file()), path)
    if not path.is_file():
        raise UsageError(f"{path}: no evaluation there; run `quantlab eval` on it first")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(found[key], dict) for key in ("windows", "settings", "perplexity", "tasks"))
        whole = whole and all(key in found["settings"] for key in (*SAME, "texts")) and "nll" in found["windows"]
        whole = whole and all(isinstance(x, float) for values in found["windows"].values() for x in values)
    except (ValueError, KeyError, TypeError, OSError):
        whole = False
    if not whole:
        raise UsageError(f"{path}: is not a result of `quantlab eval`; run it again")
    return found


def _check(a: str, first: dict[str, Any], b: str, second: dict[str, Any]) -> None:
    for key in (*SAME, "context"):
        one, other = (run["settings"].get(key, 0) for run in (first, second))  # older files have no context
        if one != other:
            if key == "tokens_sha256":
                key, one, other = "text", *(", ".join(run["settings"]["texts"]) for run in (first, second))
                other += " (other tokens)" if one == other else ""
            raise UsageError(
                f"{a} and {b} were not measured alike: {key} {one} and {other}; repeat `quantlab eval` on one of them "
                f"with the settings of the other"
            )
    for name in first["windows"].keys() & second["windows"].keys():
        if len(first["windows"][name]) != len(second["windows"][name]):
            raise UsageError(f"{a} and {b} have a different number of windows; repeat `quantlab eval` on one of them")
    base = first["windows"].get("baseline_nll"), second["windows"].get("baseline_nll")
    if None not in base and not torch.allclose(torch.tensor(base[0]), torch.tensor(base[1]), rtol=1e-3):
        raise UsageError(
            f"{a} and {b} were measured against different baselines: {first['baseline']} and {second['baseline']}; "
            f"repeat `quantlab eval` on one of them with the baseline of the other"
        )


def _paired(name: str, first: dict[str, Any], second: dict[str, Any]) -> Difference:
    one, other = (torch.tensor(run["windows"][name], dtype=torch.float64) for run in (first, second))
    change = estimate((other - one)[:, None])
    sigmas = change.value / change.error if change.error else None
    if name == "nll":
        perplexities = math.exp(float(one.mean())), math.exp(float(other.mean()))
        return Difference("perplexity (B / A)", perplexities[0], perplexities[1], exponential(change), sigmas)
    return Difference(f"{MEASURES[name]} (B - A)", float(one.mean()), float(other.mean()), change, sigmas)


def _tasks(first: dict[str, Any], second: dict[str, Any]) -> Iterable[Difference]:
    """Tasks keep no score per question, so their errors are combined as independent ones: an upper bound."""
    for name in (name for name in first if name in second):
        one, other = first[name], second[name]
        if one["metric"] != other["metric"] or None in (one["score"], other["score"]):
            continue
        errors = (one["error"], other["error"])
        error = None if None in errors else math.hypot(*errors)
        change = Estimate(other["score"] - one["score"], error)
        sigmas = change.value / error if error else None
        yield Difference(f"{name}: {one['metric']} (B - A)", one["score"], other["score"], change, sigmas)


def _notes(first: dict[str, Any], second: dict[str, Any]) -> Iterable[str]:
    one, other = first["settings"], second["settings"]
    if one.get("device") != other.get("device"):
        yield f"devices differ: {one.get('device')} and {other.get('device')}"
    for name in ("kv", "attention"):
        if one.get(name, "none") != other.get(name, "none"):
            yield f"{name} differs: {one.get(name, 'none')} and {other.get(name, 'none')}"
    versions = one.get("versions", {}), other.get("versions", {})
    for name in versions[0].keys() & versions[1].keys():
        if versions[0][name] != versions[1][name]:
            yield f"versions of {name} differ: {versions[0][name]} and {versions[1][name]}"
    for name in AGAINST_BASELINE:
        if (name in first["windows"]) != (name in second["windows"]):
            yield f"one of the runs had no baseline, so {MEASURES[name]} is not compared"
