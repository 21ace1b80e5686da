"""Is a checkpoint what it says it is, and will others load it? Works on foreign FP8 checkpoints too.

Hashes against our manifest, names, shapes and dtypes against the config and the model, scales finite and positive, no
NaN, and the rules of the loaders. A finding is one line; nothing is ever changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab import keys
from quantlab.checkpoint import KEY_STATISTICS, MANIFEST, WEIGHT
from quantlab.errors import PreflightError, VerificationError
from quantlab.kinds import FLOATS, missing_experts
from quantlab.loaders import RULES, View
from quantlab.locate import require_name
from quantlab.output import FileRecord, hash_file
from quantlab.preflight import known_architecture
from quantlab.source import Source
from quantlab.summary import Shown, Table

NAN_CODE = 0x7F  # the one magnitude of E4M3 that is no number
SHOWN = 20


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was found wrong."""

    name: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Verification(Shown):
    """problems: one line each. notes: what does no harm but may surprise."""

    folder: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(problem for check in self.checks for problem in check.problems)

    def tables(self) -> list[Table]:
        return [(self.folder, ("check", "result"), [*self.rows()])]

    def rows(self) -> list[tuple[str, str]]:
        """(check, result) for people."""
        rows = []
        for check in self.checks:
            shown = check.problems[:SHOWN]
            more = [f"... and {len(check.problems) - SHOWN} more"] if len(check.problems) > SHOWN else []
            rows += [(check.name, "ok")] if not shown else [(check.name, line) for line in (*shown, *more)]
        return rows + [("note", note) for note in self.notes]

    def to_dict(self) -> dict[str, Any]:
        checks = [{"name": check.name, "problems": list(check.problems)} for check in self.checks]
        return {"folder": self.folder, "ok": not self.problems, "checks": checks, "notes": list(self.notes)}


def verify(folder: str | Path) -> Verification:
    """Check everything about a quantized checkpoint; reads all of it.

    Raises UsageError or PreflightError for what is no checkpoint at all, VerificationError for one that is not
    quantized.
    """
    require_name(folder)
    folder = Path(folder)
    view = _view(folder)
    whole = Check("the model is whole", tuple(_parts_missing(view)))
    numbers = Check("codes are numbers", tuple(_nan_codes(view)))
    plain = Check("values are numbers", tuple(_nan_values(view)))
    checks = [*_manifest(folder), whole, numbers, plain, *_structure(view)]
    return Verification(str(folder), tuple(checks), tuple(_notes(view)))


def verify_weights(folder: Path) -> list[str]:
    """What is wrong with the names, shapes and scales of a folder, by all rules; for a run that just wrote it."""
    return [problem for check in _structure(_view(folder)) for problem in check.problems]


def _view(folder: Path) -> View:
    source = Source.open(folder)
    stored = source.stored
    if stored is None:
        raise VerificationError(f"{folder}: is not quantized (its config.json has no quantization_config)")
    return View(source, stored, known_architecture(source)[0])


def _structure(view: View) -> list[Check]:
    checks = [Check("scales are positive and finite", tuple(_bad_scales(view)))]
    if (view.source.folder / KEY_STATISTICS).is_file():
        checks.append(Check("key statistics are of these weights", tuple(keys.problems(view.source))))
    if not view.quantized:
        checks.append(Check("something is quantized", (f"{view.source.folder}: holds no quantized weight",)))
    return checks + [Check(f"{rule.reader}: {rule.says}", tuple(rule.broken(view))) for rule in RULES]


def _manifest(folder: Path) -> Iterator[Check]:
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        records = [FileRecord(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["files"]]
        files = {str(record.name): (int(record.bytes), record.sha256) for record in records}
    except (ValueError, KeyError, TypeError):
        raise PreflightError(f"{path}: is not a manifest") from None
    problems = []
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name}: is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name}: has {file.stat().st_size:,} bytes, the manifest says {size:,}")
        elif hash_file(file) != digest:
            problems.append(f"{name}: is not the file that was written (SHA-256 differs)")
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in files:
            problems.append(f"{file.name}: is not in the manifest")
    yield Check("files are those of the manifest", tuple(problems))


def _parts_missing(view: View) -> Iterator[str]:
    """Parameters without a tensor, and tensors of another shape: `load` refuses both. Where transformers does not know
    the model, or ignores a part of it, there is nothing to compare with but other experts."""
    tensors, known = view.source.tensors, view.architecture
    for name in known.missing if known else ():
        yield f"{name}: no tensor of the checkpoint goes there"
    for name, wanted in known.shapes.items() if known else ():
        if name in tensors and name not in view.stacks and tensors[name].shape != wanted:
            yield f"{name}: has shape {list(tensors[name].shape)}, by config.json {list(wanted)}"
    others = (m for m in chain(view.quantized, view.plain) if known is None or m + WEIGHT not in known.kinds)
    yield from (f"{module}: is missing, other experts have one" for module in missing_experts(others))


def _bad_scales(view: View) -> Iterator[str]:
    of_cache = ((name, view.source.read(name).float()) for name, i in view.kv_scales.items() if i.dtype in FLOATS)
    for module, values in chain(_scale_values(view), of_cache):
        bad = int((~(torch.isfinite(values) & (values > 0))).sum())
        if bad:
            yield f"{module}: {bad:,} of {values.numel():,} scales are not positive and finite"


def _scale_values(view: View) -> Iterator[tuple[str, Tensor]]:
    for module, info in view.scales.items():
        if info.dtype in FLOATS:
            yield module, view.source.read(info.name).to(torch.float32)


def _nan_codes(view: View) -> Iterator[str]:
    for module, info in view.quantized.items():
        if info.dtype != "F8_E4M3":
            continue  # integers are always numbers
        codes = view.source.read(info.name).view(torch.uint8)
        bad = int(((codes & 0x7F) == NAN_CODE).sum())
        if bad:
            yield f"{module}: {bad:,} codes are NaN"


def _nan_values(view: View) -> Iterator[str]:
    """In what is not quantized: `quantize` refuses it in a source."""
    scales = {info.name for info in (*view.scales.values(), *view.kv_scales.values())}
    for name, info in view.source.tensors.items():
        bad = int(view.source.read(name).isnan().sum()) if info.dtype in FLOATS and name not in scales else 0
        if bad:
            yield f"{name}: {bad:,} of {info.elements:,} values are NaN"


def _notes(view: View) -> Iterator[str]:
    if view.stored.weight.block[0] <= 1:
        return
    other = [module for module, values in _scale_values(view) if bool((torch.frexp(values)[0] != 0.5).any())]
    if other:
        yield (
            f"{len(other)} layers (first: {other[0]}) have scales that are no powers of two: "
            "vLLM requantizes them at load, which costs accuracy"
        )
