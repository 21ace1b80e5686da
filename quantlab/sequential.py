"""Calibration of INT4 schemes: blocks are quantized one after the other, each for the inputs that it will get.

What a block became lies in a file of its own, in a folder that outlives an interrupted run: the next one runs finished
blocks with the codes that they have and goes on behind them. `stream` then takes codes and scales from there, band by
band, as it writes the checkpoint.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlab.architecture import load_targets
from quantlab.baselines import digest
from quantlab.errors import PreflightError
from quantlab.shards import TORCH_DTYPES, TensorInfo
from quantlab_calib.blockwise import Block, Blockwise
from quantlab_calib.capture import CaptureError
from quantlab_calib.rotate import RotationError
from quantlab_kernels.formats import INT4
from quantlab_kernels.packing import unpack_int4
from quantlab_kernels.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from quantlab.lazy import LazyModel
    from quantlab.output import Output
    from quantlab.preflight import Plan
    from quantlab.scheme import Calibration
    from quantlab.summary import Progress
    from quantlab_calib.blockwise import Steps

CHANGED = "changed"  # key of the summary: weights are not those of the original, rounded
SHOWN_NOTES = 3  # on layers that saw too little data
FORMAT = 2  # raised whenever the same steps give other codes than before


@dataclass(frozen=True)
class Place:
    """Where the codes of a module lie: file, name of the layer in it, first row."""

    file: Path
    layer: str
    row: int


@dataclass
class Rounded:
    """Weights that were rounded by blocks; the interface of `calibrated.Statistics`.

    places   module of the quantized checkpoint -> where its codes lie
    tokens   layer -> how many tokens it saw
    replacements  tensor of the checkpoint that scales were folded into -> its value
    scaled   producer of an input -> exponents of the scales folded into it
    resumed  blocks that an earlier run had finished
    errors   block -> error of its output before and after tuning, relative, on held-out rows
    digest   of the tokens
    """

    plan: Plan
    calibration: Calibration
    seen: int
    folder: Path
    places: dict[str, Place] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    replacements: dict[str, Tensor] = field(default_factory=dict)
    scaled: dict[str, tuple[float, float]] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    resumed: int = 0
    digest: str = ""

    def rounded(self, module: str, weight: Tensor, begin: int) -> QuantizedTensor | None:
        """Rows `begin` and following of a weight, quantized; None for a module that no block holds."""
        place = self.places.get(module)
        if place is None:
            return None
        rows = slice(place.row + begin, place.row + begin + len(weight))
        with safe_open(place.file, "pt") as file:
            words = file.get_slice(f"{place.layer}.words")[rows]
            scale = file.get_slice(f"{place.layer}.scale")[rows]
        codes = unpack_int4(words.to(weight.device), weight.shape[1])
        return QuantizedTensor(codes, scale.to(weight.device), self.plan.stored.kind(module).weight)

    def save(self, out: Output) -> None:
        """Nothing lies beside the checkpoint."""

    def summary(self) -> dict[str, Any]:
        """For the closing summary."""
        total = sum(len(decision.parts) for decision in self.plan.quantized)
        found: dict[str, Any] = {
            "data": f"{self.calibration.data}: {self.seen} tokens",
            "steps": self.calibration.describe(),
            "layers": f"{len(self.places)} of {total} rounded block by block",
        }
        experts = [count for layer, count in self.tokens.items() if layer.endswith("]") or ".experts." in layer]
        if experts:
            found["tokens per expert"] = f"{min(experts)} to {max(experts)}, median {statistics.median_low(experts)}"
        if self.resumed:
            found["continued"] = f"{self.resumed} blocks were finished by an earlier run"
        if self.scaled:
            chosen = Counter(self.scaled.values()).most_common(1)[0]
            found["scales"] = f"folded into {len(self.scaled)} layers and norms, exponents mostly {chosen[0]}"
        if self.scaled or self.replacements:
            found[CHANGED] = "weights were turned or scaled before rounding, and what is around them the other way"
        if self.errors:
            before, after = (statistics.fmean(column) for column in zip(*self.errors.values(), strict=True))
            found["tuning"] = f"error of a block's output {before:.3g}, then {after:.3g}"
        return found | {f"note {number}": note for number, note in enumerate(gathered(self.notes), start=1)}


def gathered(notes: list[str]) -> list[str]:
    """Notes, those on layers that saw too little as one where they are many: experts come in thousands."""
    few = {note: int(found[1]) for note in notes if (found := re.search(r": saw (\d+) tokens, rounded without", note))}
    if len(few) <= SHOWN_NOTES:
        return notes
    first = next(iter(few)).partition(":")[0]
    together = f"{first} and {len(few) - 1} others: saw {min(few.values())} to {max(few.values())} tokens, "
    return [*(note for note in notes if note not in few), together + "rounded without data"]


@dataclass(frozen=True)
class Sequential:
    """Quantizes the blocks at `path` of a model one after the other.

    wanted  name of a linear layer of the model -> modules of the quantized checkpoint that it is made of
    folder  holds what each block became, until the checkpoint is written
    """

    lazy: LazyModel
    plan: Plan
    calibration: Calibration
    windows: Tensor
    path: str
    wanted: dict[str, list[str]]
    folder: Path
    progress: Progress | None = None

    def run(self, steps: Steps) -> Rounded:
        """A rotation that the model does not bear is left out with a note, unless the recipe asks for it by name."""
        model = self.lazy.source.model
        for rotate in dict.fromkeys((steps.rotate, False)):
            try:
                result = self._attempt(replace(steps, rotate=rotate))
            except RotationError as error:
                if self.calibration.rotate:
                    how = "leave rotate out of the steps"
                    raise PreflightError(f"{model}: cannot be rotated: {error}; {how}") from None
                reason = f"not rotated: {error}"
                continue
            except CaptureError as error:
                if self.calibration.rotate or not rotate:
                    raise PreflightError(
                        f"{model}: its blocks do not run one by one ({error}); use --steps rtn"
                    ) from None
                reason = f"not rotated: {error}"
                continue
            except torch.OutOfMemoryError:
                how = "use --device cpu or --steps rtn"
                raise PreflightError(f"{model}: ran out of memory on {self.lazy.device}; {how}") from None
            if steps.rotate and not rotate:
                result.notes.insert(0, reason)
            _check_places(result)
            return result
        raise AssertionError("the last attempt does not rotate")

    @cached_property
    def int4(self) -> dict[str, list[str]]:
        """What is wanted, of layers that become INT4 throughout."""
        return {name: found for name, found in self.wanted.items() if all(_is_int4(self.plan, m) for m in found)}

    def _attempt(self, steps: Steps) -> Rounded:
        store = Store(self.folder, self.windows, steps)
        result = Rounded(self.plan, self.calibration, self.windows.numel(), self.folder, digest=digest(self.windows))
        targets = plain_targets(self.lazy, self.plan)
        dtypes = {tensor: TORCH_DTYPES[self.lazy.source.tensors[tensor].dtype] for tensor in targets.values()}
        total = len(self.lazy.model.get_submodule(self.path))
        blocks = Blockwise(
            self.lazy.model,
            self.windows,
            self.lazy,
            self.path,
            lambda name: name in self.int4,
            steps,
            device=self.lazy.device,
            done=store.read,
            loaded=partial(self._find_places, store, result.places),
            stored=lambda name: dtypes.get(targets.get(name, "")),
        )
        for number, block in enumerate(blocks.run(), start=1):
            result.resumed += not store.write(block)
            result.tokens |= block.tokens
            result.notes += block.notes
            result.scaled |= block.scaled
            result.replacements |= {targets[name]: value for name, value in block.changed.items()}
            if block.error is not None:
                result.errors[block.path] = block.error
            if self.progress is not None:
                self.progress(f"calibrating {block.path}", number, total)
        result.replacements |= {targets[name]: value for name, value in blocks.ends.items()}
        return result

    @cached_property
    def _parts(self) -> dict[str, TensorInfo]:
        return {module: info for decision in self.plan.quantized for module, info in decision.parts}

    def _find_places(self, store: Store, places: dict[str, Place], block: str, layers: dict[str, Tensor]) -> None:
        """Where the modules of a block will lie, from its weights as they were loaded."""
        for name, weight in layers.items():
            for module in self.int4[name]:
                info = self._parts[module]
                row = first_row(weight, partial(self.lazy.source.reader.read, info), info.shape[0])
                if row is not None:
                    places[module] = Place(store.file(block), name, row)


def _check_places(result: Rounded) -> None:
    """What is rounded from the source must not have been changed; a layer that no block holds is."""
    modules = [module for decision in result.plan.quantized for module, _ in decision.parts]
    missing = [module for module in modules if module not in result.places]
    if missing and result.replacements:
        raise PreflightError(
            f"{missing[0]}: was not seen by calibration, which changed weights around it; "
            "leave rotate and smooth out of the steps"
        )
    groups = {
        "of other schemes": [module for module in missing if not _is_int4(result.plan, module)],
        "in no block": [module for module in missing if _is_int4(result.plan, module)],
    }
    for what, modules in groups.items():
        if modules:
            result.notes.append(f"{len(modules)} layers {what} are rounded without data: {modules[0]}, ...")


def _is_int4(plan: Plan, module: str) -> bool:
    return plan.stored.kind(module).weight.format is INT4


def plain_targets(lazy: LazyModel, plan: Plan) -> dict[str, str]:
    """Parameter of the model -> the one tensor of the checkpoint that it is, renamed at most, unquantized."""
    copied = [decision.tensor for decision in plan.decisions if decision.scheme is None]
    found: dict[str, list[str]] = {}
    for tensor, target in load_targets(lazy.model, copied).items():
        found.setdefault(target.parameter, []).append("" if target.rearranged or target.patterns else tensor)
    return {parameter: tensors[0] for parameter, tensors in found.items() if len(tensors) == 1 and tensors[0]}


def first_row(weight: Tensor, read: Callable[[tuple[int, int] | None], Tensor], rows: int) -> int | None:
    """Where in a layer's weight a part of so many rows begins; None where it is not there.

    `read` reads rows of the part, or all of it for None: its first one, and all where that occurs several times, as one
    of zeros may.
    """
    if len(weight) == rows:
        return 0
    first = read((0, 1)).to(weight.device, weight.dtype)
    found: list[int] = (weight[: max(len(weight) - rows + 1, 0)] == first).all(dim=1).nonzero().flatten().tolist()
    if len(found) > 1:
        part = read(None).to(weight.device, weight.dtype)
        found = [row for row in found if torch.equal(weight[row : row + rows], part)]
    return found[0] if found else None


class Store:
    """Blocks in files, for an interrupted run to continue from. What was made otherwise does not count."""

    def __init__(self, folder: Path, windows: Tensor, steps: Steps) -> None:
        self.folder, self.key = folder, f"{FORMAT} {steps} {digest(windows)}"
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, path: str) -> Path:
        return self.folder / f"{path}.safetensors"

    def write(self, block: Block) -> bool:
        """Keep a block; False where an earlier run had done so."""
        if self.read(block.path) is not None:
            return False
        tensors: dict[str, Tensor] = {}
        for name, (words, scale) in block.rounded.items():
            tensors |= {f"{name}.words": words, f"{name}.scale": scale.contiguous()}
        tensors |= {f"{name}.changed": value.contiguous() for name, value in block.changed.items()}
        about = asdict(replace(block, rounded={}, changed={}))
        temporary = self.file(block.path).with_suffix(".part")
        save_file(tensors, temporary, {"key": self.key, "about": json.dumps(about)})
        temporary.replace(self.file(block.path))
        return True

    def read(self, path: str) -> Block | None:
        """What an earlier run with the same data and steps made of a block."""
        try:
            with safe_open(self.file(path), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                about = json.loads(metadata["about"])
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        block = Block(**about)
        block.error = None if block.error is None else (block.error[0], block.error[1])
        block.scaled = {producer: (a, b) for producer, (a, b) in block.scaled.items()}
        for name in names:
            layer, _, kind = name.rpartition(".")
            if kind == "words":
                block.rounded[layer] = (tensors[name], tensors[f"{layer}.scale"])
            elif kind == "changed":
                block.changed[layer] = tensors[name]
        return block
