"""One page that says what quantization did to a model and what it cost, with all that is needed to do it again.

The page is one HTML file that loads nothing, with the same content as JSON beside it. It shows what the checkpoint's
folder holds; with the original weights also the error of each layer's weight, and with data the error of each layer's
output and the outliers in its input. What is missing is named, with the command that would bring it.
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, resources
from pathlib import Path
from types import NoneType
from typing import Any

from quantlab import plots
from quantlab.checkpoint import OURS, RECIPE, SUMMARY
from quantlab.errors import PreflightError, UsageError
from quantlab.generation import agreement, write
from quantlab.kinds import position
from quantlab.layer_errors import Observed, Pair, observe, weight_errors
from quantlab.output import check_file, to_json, write_file
from quantlab.plots import Plot
from quantlab.scheme import Recipe
from quantlab.sequential import CHANGED
from quantlab.source import Source
from quantlab.summary import Progress

EVALUATION = f"{OURS}/eval.json"
Kinds = Mapping[str, type | tuple[type, ...]]  # of the values that JSON needs to have

SCHEMA = 1  # of the JSON
NUMBER = (int, float)
NEEDED: Kinds = {
    "bytes_before": NUMBER, "bytes_after": NUMBER, "groups": dict, "seconds": NUMBER, "shares": dict, "device": str,
    "tensor_parallel": (int, NoneType), "warnings": list,
}  # fmt: skip
NEEDED_OF_EVALUATION: Kinds = {
    "perplexity": dict, "baseline": (str, NoneType), "tasks": dict, "windows": dict, "settings": dict
}  # fmt: skip
SHOWN_AS = {"model": "quantized", "baseline": "original"}  # the models of an evaluation
SHOWN_LAYERS = 4  # with a plot of their channels
WORST = 12  # layers in a table


@dataclass(frozen=True)
class Report:
    """All that a report says, as plain data.

    model       folder of the checkpoint
    missing     what the report does not show, and how to get it
    recipe      TOML text, summary: of the run, evaluation: of `evaluate`; None where the folder has none
    layers      a row for each quantized layer: module, depth, type, weight_sqnr_db, output_sqnr_db
    outliers    of every input of linear layers, the worst first
    cache       a row for each layer's keys or values and each way to keep them quantized: sqnr_db
    keys        the extent of the channels of each layer's keys
    tokens      that ran through the model for the two
    texts       what the quantized model and, where it was given, the original write, here or in the evaluation
    """

    model: str
    scheme: str
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recipe: str | None = None
    summary: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    outliers: list[dict[str, Any]] = field(default_factory=list)
    cache: list[dict[str, Any]] = field(default_factory=list)
    keys: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds. Of the channels of an input only the largest."""
        outliers = [{key: value for key, value in layer.items() if key != "channels"} for layer in self.outliers]
        found = {"schema": SCHEMA, **self.__dict__, "outliers": outliers}
        del found["keys"]  # thousands of channels, for a plot
        return found


@dataclass(frozen=True)
class Written:
    """The files of a report, and what it does not show."""

    html: Path
    json: Path
    images: tuple[Path, ...]
    missing: tuple[str, ...]


def report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    baseline: str | Path | None = None,
    baseline_revision: str | None = None,
    calibration: str | None = None,
    generate: bool = False,
    png: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the report of a quantized checkpoint.

    output       the HTML file, by default DIR/quantlab/report.html; JSON and images go beside it
    baseline     the model that it was made from: adds the error of each weight; baseline_revision: its branch, tag or
                 commit on the hub
    calibration  "bundled", a file or a data set: with a baseline adds output errors and outliers
    generate     adds texts that the model writes, side by side with the baseline's, its speed and its memory

    Raises UsageError for an unfinished run, a folder that is no quantized checkpoint, a baseline of another model, and
    where matplotlib is missing.
    """
    plots.require()
    if calibration is not None and baseline is None:
        raise UsageError("--calib runs data through the original model; give it as well: --baseline MODEL")
    if baseline_revision is not None and baseline is None:
        raise UsageError("--baseline-revision is of a baseline; give its hub id as well: --baseline MODEL")
    folder = _finished(Path(folder))
    target = Path(output) if output is not None else folder / OURS / "report.html"
    if target.is_dir() or target.suffix == ".json":
        raise UsageError(f"{target}: cannot take the page; give the name of an HTML file, the JSON goes beside it")
    check_file(target)
    made = collect(
        folder, baseline, calibration, baseline_revision, trust_remote_code=trust_remote_code, progress=progress
    )
    if generate:
        models = {"quantized": folder}
        if baseline is not None:
            models["original"] = Source.open(baseline, baseline_revision).folder
        texts = {who: write(path, trust_remote_code=trust_remote_code) for who, path in models.items()}
        made = replace(made, texts={who: asdict(text) for who, text in texts.items()})
    drawn = draw(made)
    images = {target.with_name(f"{target.stem}-{plot.name}.png"): plot for plot in drawn} if png else {}
    beside = target.with_suffix(".json")
    write_file(target, render(made, drawn))
    write_file(beside, to_json(made.to_dict()))
    for path, plot in images.items():
        write_file(path, plot.png())
    return Written(target, beside, tuple(images), tuple(made.missing))


def collect(
    folder: Path,
    baseline: str | Path | None = None,
    calibration: str | None = None,
    baseline_revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Everything there is to say."""
    source = Source.open(folder)
    stored = source.stored
    if stored is None:
        raise UsageError(f"{folder}: is not quantized; a report shows what `quantlab quantize` did")
    summary, evaluation = _json(folder / SUMMARY, NEEDED), _json(folder / EVALUATION, NEEDED_OF_EVALUATION)
    recipe = (folder / RECIPE).read_text(encoding="utf-8") if (folder / RECIPE).is_file() else None
    if recipe is not None:
        Recipe.from_toml(folder / RECIPE)  # refuses what is damaged
    seen = Observed(0)
    weights: dict[str, float | None] = {}
    changed = (summary or {}).get("calibration", {}).get(CHANGED)
    if baseline is not None:
        pair = Pair(source, Source.open(baseline, baseline_revision))
        weights = weight_errors(pair, progress) if changed is None else {}
        if calibration is not None:
            seen = observe(pair, calibration, progress=progress, trust_remote_code=trust_remote_code)
    rows: list[dict[str, Any]] = []
    for module, decibels in weights.items():
        depth, kind = position(module)
        row = {"module": module, "depth": depth, "type": kind, "weight_sqnr_db": decibels}
        rows.append(row | {"output_sqnr_db": seen.output.get(module)})
    if baseline is not None:
        model, revision = str(baseline), baseline_revision
    else:
        model, revision = (evaluation or {}).get("baseline") or "MODEL", _baseline_revision(evaluation)
    return Report(
        model=str(folder),
        scheme=stored.scheme or stored.layout,
        missing=list(_missing(summary, evaluation, baseline, calibration, folder, _against(model, revision), changed)),
        notes=[*(summary or {}).get("warnings", ()), *seen.notes],
        recipe=recipe,
        summary=summary,
        evaluation=evaluation,
        layers=rows,
        outliers=seen.outliers,
        cache=seen.cache,
        keys=seen.keys,
        tokens=seen.tokens,
        texts={SHOWN_AS[who]: found for who, found in (evaluation or {}).get("generation", {}).items()},
        commands=list(_commands(folder, model, revision, recipe, evaluation, calibration)),
        versions=_versions(),
    )


def _finished(folder: Path) -> Path:
    """Raise UsageError for a run that has not finished: the numbers of half a model would mislead."""
    partial = folder if folder.name.endswith(".partial") else folder.with_name(folder.name + ".partial")
    if partial.is_dir() and (partial == folder or not folder.exists()):
        whole = partial.name.removesuffix(".partial")
        raise UsageError(
            f"{folder}: the run that makes {whole} has not finished, {partial.name} holds what there is; "
            f"run the same `quantlab quantize` again, it continues"
        )
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the one that `quantlab quantize` made")
    return folder


def _json(path: Path, needed: Kinds) -> dict[str, Any] | None:
    """A JSON object that has what the page shows of it; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise PreflightError(f"{path}: is not JSON; run the command that made it again") from None
    for key, kind in needed.items():
        if not isinstance(found, dict) or key not in found or not isinstance(found[key], kind):
            raise PreflightError(f"{path}: has no {key!r} that could be shown; run the command that made it again")
    return found


def _missing(
    summary: Any,
    evaluation: Any,
    baseline: Any,
    calibration: str | None,
    folder: Path,
    against: str,
    changed: str | None,
) -> Iterable[str]:
    where = shlex.quote(str(folder))
    if summary is None:
        yield f"sizes, coverage and time: {SUMMARY} is not there, another tool made this checkpoint"
    if evaluation is None:
        yield f"quality: not measured yet; quantlab eval {where}{against}"
    elif evaluation.get("baseline") is None:
        yield f"loss against the original: quantlab eval {where}{against}"
    if changed is not None:
        yield f"errors of weights and outputs, layer by layer: {changed}; the evaluation compares the whole models"
    elif baseline is None:
        yield f"error of each layer's weight: quantlab report {where}{against}"
    if calibration is None:
        shown = "outliers" if changed else "error of each layer's output, outliers"
        yield f"{shown}: quantlab report {where}{against} --calib bundled"


def _against(model: str, revision: str | None) -> str:
    """The options that name a baseline."""
    return f" --baseline {shlex.quote(model)}" + (f" --baseline-revision {shlex.quote(revision)}" if revision else "")


def _baseline_revision(evaluation: dict[str, Any] | None) -> str | None:
    found = (evaluation or {}).get("settings", {}).get("baseline_revision")  # not in older files
    return found if isinstance(found, str) else None


def _commands(
    folder: Path,
    model: str,
    revision: str | None,
    recipe: str | None,
    evaluation: dict[str, Any] | None,
    calibration: str | None,
) -> Iterable[str]:
    where = shlex.quote(str(folder))
    if recipe is not None:
        source = shlex.quote(model) + (f" --revision {shlex.quote(revision)}" if revision else "")
        yield f"quantlab quantize {source} --recipe {shlex.quote(str(folder / RECIPE))} --output {where}"
    if evaluation is not None:
        settings = evaluation.get("settings", {})
        base = evaluation.get("baseline")
        against = _against(base, _baseline_revision(evaluation)) if base else ""
        texts = [text for text in settings.get("texts", ()) if text != "bundled"]
        read = "".join(f" --{'text' if Path(t).is_file() else 'dataset'} {shlex.quote(t)}" for t in texts)
        asked = (name for name, task in evaluation["tasks"].items() if task.get("group") is None)
        read += "".join(f" --tasks {shlex.quote(task)}" for task in asked)
        size = f" --windows {settings.get('windows')} --length {settings.get('length')}"
        given = {key: settings.get(key) for key in ("context", "kv", "attention")}
        size += "".join(f" --{key} {value}" for key, value in given.items() if value not in (None, 0, "none"))
        size += " --generate" if evaluation.get("generation") else ""
        yield f"quantlab eval {where}{against}{read}{size}"
    data = f" --calib {shlex.quote(calibration)}" if calibration else ""
    yield f"quantlab report {where}{_against(model, revision)}{data}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("quantlab-toolkit", "torch", "transformers", "safetensors", "matplotlib"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "source"
    return found


# --- plots ------------------------------------------------------------------------------------------------------------


def draw(made: Report) -> list[Plot]:
    """Every plot that there are numbers for."""
    return [*_coverage(made), *_quality(made), *_errors(made), *_outliers(made), *_cache(made)]


def _coverage(made: Report) -> Iterable[Plot]:
    groups = (made.summary or {}).get("groups")
    if groups:
        yield plots.bars(
            "coverage",
            "Where the bytes of the original went",
            "Look for large bars that are not quantized: their reason says what to change to make the model smaller.",
            {what: entry["bytes"] / 1e6 for what, entry in groups.items()},
            "size in the original (MB)",
        )


def _quality(made: Report) -> Iterable[Plot]:
    per_window = (made.evaluation or {}).get("windows", {}).get("kl")
    if per_window:
        yield plots.dots(
            "kl",
            "KL to the original, window by window",
            "Look for windows far above the dashed mean: a kind of text that the quantized model handles worse.",
            per_window,
            ("window of the evaluation text", "KL (nats per token)"),
        )


def _errors(made: Report) -> Iterable[Plot]:
    for key, what, look in (
        ("weight", "weights", "Look for dark cells: layers whose weights lost most. 6 dB less is twice the error."),
        (
            "output",
            "outputs",
            "Each layer alone, on the original's input. Look for dark cells that the map of weights does not have: "
            "there the activations are hard to quantize, and calibration or smoothing helps.",
        ),
    ):
        cells = _cells((row["depth"], row["type"], row[f"{key}_sqnr_db"]) for row in made.layers)
        if cells:
            yield plots.heat_map(f"{key}-error", f"Error of the layers' {what}", look, cells, "SQNR (dB), high is good")


def _cache(made: Report) -> Iterable[Plot]:
    cells = _cells((row["depth"], row["form"], row["sqnr_db"]) for row in made.cache)
    if cells:
        yield plots.heat_map(
            "cache-error",
            "What a quantized KV cache would lose",
            "Keys against their distance from their mean, values as they are. Look for dark cells in the rows of "
            "centred keys and of values: formats there cost quality. Plain keys are dark where channels have outliers.",
            cells,
            "SQNR (dB), high is good",
        )
    worst = sorted(made.keys, key=lambda keys: -_peak(keys["channels"]))[:2]
    if worst:
        ways = (("channels", "as they are"), ("centred", "centred"))
        yield plots.channels(
            "keys",
            "Keys with the largest channels, before and after centring",
            "Before the rotary embedding. Look for spikes that centring takes away: constants of a channel, which cost "
            "all other channels of a token their codes unless they are subtracted.",
            [(f"{k['module']}, {say}", k[way], statistics.median(k[way])) for k in worst for way, say in ways],
            of="key",
        )


def _peak(channels: list[float]) -> float:
    """The largest channel over the median one."""
    return max(channels) / max(statistics.median(channels), 1e-30)


def _outliers(made: Report) -> Iterable[Plot]:
    cells = _cells((position(layer["module"])[0], layer["input"], layer["ratio"]) for layer in made.outliers)
    if not cells:
        return
    yield plots.heat_map(
        "outliers",
        "Outliers in the layers' inputs",
        "The largest channel over the median one. Look for dark cells, above about 100: a few channels there decide "
        "the scale of all others.",
        cells,
        "largest / median channel",
        log=True,
        bad_is_high=True,
    )
    worst = made.outliers[:SHOWN_LAYERS]
    yield plots.channels(
        "channels",
        f"Channels of the {len(worst)} inputs with the worst outliers",
        "Absolute maximum of each input channel. Look for single spikes far above the dashed median.",
        [(f"{layer['module']}: {layer['ratio']:.0f}x", layer["channels"], layer["median"]) for layer in worst],
    )


def _cells(rows: Iterable[tuple[int | None, str, float | None]]) -> dict[tuple[int, str], float]:
    """Median of each cell: experts share one."""
    found: dict[tuple[int, str], list[float]] = {}
    for depth, kind, value in rows:
        if depth is not None and value is not None:
            found.setdefault((depth, kind), []).append(value)
    return {cell: statistics.median(values) for cell, values in sorted(found.items(), key=lambda item: item[0][0])}


# --- the page ---------------------------------------------------------------------------------------------------------


def render(made: Report, drawn: list[Plot]) -> str:
    """The HTML page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from matplotlib.ticker import EngFormatter

    page = resources.files("quantlab").joinpath("templates", "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = EngFormatter(unit="B", places=1)
    environment.filters["breakable"] = lambda path: Markup(".<wbr>").join(path.split("."))
    environment.filters["decibels"] = lambda value: "" if value is None else f"{value:.1f}"
    measured = [row for row in made.layers if row["weight_sqnr_db"] is not None]
    key = "output_sqnr_db" if any(row["output_sqnr_db"] is not None for row in measured) else "weight_sqnr_db"
    worst = sorted((row for row in measured if row[key] is not None), key=lambda row: row[key])[:WORST]
    return environment.from_string(page).render(
        made=made,
        plots={plot.name: plot for plot in drawn},
        name=Path(made.model).resolve().name,
        cards=list(_cards(made)),
        worst=worst,
        samples=list(_samples(made)),
        calibration=_calibration(made),
    )


def _cards(made: Report) -> Iterable[tuple[str, str, str]]:
    """(label, value, detail) of the numbers that come first."""
    if made.summary:
        before, after = made.summary["bytes_before"], made.summary["bytes_after"]
        yield "size", f"{before / max(after, 1):.2f}× smaller", f"{before / 1e6:,.1f} → {after / 1e6:,.1f} MB"
    found = made.evaluation or {}
    if found.get("recovery") is not None:
        yield "recovery", f"{100 * found['recovery']:.2f} %", "of the original's quality; 100 % is no loss"
    if found.get("kl"):
        yield "KL to the original", *_estimate(found["kl"], "nats per token")
    if found.get("top1"):
        yield "top-1 agreement", *_estimate(found["top1"], "share of equal next tokens")
    if found.get("perplexity"):
        base = found.get("baseline_perplexity")
        detail = f"original: {base['value']:.4g}" if base else "of the quantized model"
        yield "perplexity", _estimate(found["perplexity"], "")[0], detail
    ratio = found.get("perplexity_ratio")
    if ratio:
        yield "perplexity / original's", *_estimate(ratio, "error of the paired difference")


def _estimate(found: dict[str, Any], detail: str) -> tuple[str, str]:
    error = "" if found["error"] is None else f" ± {found['error']:.2g}"
    return f"{found['value']:.4g}{error}", detail


def _samples(made: Report) -> Iterable[tuple[str, list[tuple[str, str, str]]]]:
    """(prompt, [(who, the part that both write alike, the rest)])."""
    if not made.texts:
        return
    every = list(made.texts.values())
    for index, prompt in enumerate(every[0]["prompts"]):
        texts = {who: found["texts"][index] for who, found in made.texts.items()}
        alike = agreement(*texts.values()) if len(texts) == 2 else 0
        yield prompt, [(who, text[:alike], text[alike:]) for who, text in texts.items()]


def _calibration(made: Report) -> list[tuple[str, str]]:
    """Settings and findings of the calibration of the run, and the tokens that each expert saw."""
    given = tomllib.loads(made.recipe).get("calibration", {}) if made.recipe else {}
    found = {**given, **(made.summary or {}).get("calibration", {})}
    rows = [(key, str(value)) for key, value in found.items()]
    if made.tokens:
        rows.append(("tokens of this report", f"{made.tokens:,}"))
    experts = [layer["tokens"] for layer in made.outliers if "experts" in layer["module"]]
    if experts:
        spread = f"{min(experts):,} to {max(experts):,}, median {statistics.median(experts):,.0f}"
        rows.append(("tokens per expert", spread))
    return rows
