"""Calibration: data runs through the original model, and quantization uses what was seen of each layer's inputs.

Of each quantized layer there remain the absolute maxima and energies of its input channels, and what `search.Feedback`
needs to round its weight for the layer's output. The latter is megabytes per layer, so it lies in a file per block, in
a folder that outlives an interrupted run, until `stream` comes to the layer. The next run sends the data through
finished blocks without looking at their inputs, and not at all where every block is finished.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlab import sequential
from quantlab.architecture import load_targets
from quantlab.baselines import digest
from quantlab.checkpoint import ACTIVATION_SCALES, Stored
from quantlab.errors import PreflightError, UsageError
from quantlab.kinds import context_length
from quantlab.lazy import LazyModel
from quantlab.output import Output
from quantlab.preflight import Plan, bytes_after
from quantlab.scheme import STEPS, Calibration
from quantlab.sequential import Rounded
from quantlab.shards import TensorSlot, layout
from quantlab.source import Source
from quantlab.summary import Progress
from quantlab_calib import data
from quantlab_calib.blockwise import Steps
from quantlab_calib.capture import Captured, CaptureError, capture, find_blocks
from quantlab_calib.gptq import Gptq
from quantlab_calib.observers import GROUP, ChannelStatistics
from quantlab_calib.search import Feedback
from quantlab_calib.smooth import EXPONENTS
from quantlab_calib.tune import Tune
from quantlab_kernels.formats import E4M3, INT4
from quantlab_kernels.qtensor import QuantizedTensor, TensorSpec, scale_of

BATCH_TOKENS = 4096
FAST = Gptq(sweeps=0, aim=0.7)  # few tokens: README of `calib`
CPU_SHARE = 4  # on a CPU `fast` takes a quarter of the data
CPU_WEIGHTS = 1 << 31  # and leaves larger models alone: GPTQ's work grows with the cube of a layer's width
FEWEST_TOKENS = GROUP  # with fewer tokens than a group has channels, a layer keeps plain rounding


@dataclass
class Statistics:
    """What a calibration pass saw.

    inputs   module, by its name in the quantized checkpoint -> statistics of its input
    notes    what the user should know: layers without data, the way the model was run
    replacements  tensors of the source that are to be written with other values: none
    folder   holds the `Feedback` of each layer; `files` says in which file, under which name
    digest   of the tokens
    resumed  blocks that an earlier run had finished
    """

    plan: Plan
    calibration: Calibration
    tokens: int
    folder: Path
    digest: str
    inputs: dict[str, ChannelStatistics] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    replacements: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, tuple[Path, str]] = field(default_factory=dict)
    resumed: int = 0

    def rounded(self, module: str, weight: Tensor, begin: int = 0) -> QuantizedTensor | None:
        """A weight, or a band of its rows, quantized for the layer's output; None for a layer that saw too little."""
        if module not in self.files:
            return None
        path, name = self.files[module]
        with safe_open(path, "pt") as file:
            feedback = Feedback(file.get_tensor(f"{name}.pass_on"), file.get_tensor(f"{name}.energy"))
        return feedback.to(weight.device).quantize(weight, self.plan.stored.weight)

    def activation_scales(self) -> dict[str, Tensor]:
        """Module -> static scale of each group of 128 input channels, float32 [ceil(K / 128)]: absmax / 448."""
        spec = TensorSpec(E4M3, (1, GROUP))
        return {module: scale_of(seen.group_amax(), spec) for module, seen in self.inputs.items()}

    def save(self, out: Output) -> None:
        """Write the static activation scales, where the recipe asks for them."""
        scales = self.activation_scales()
        if self.calibration.activations != "static" or not scales:
            return
        slots = [TensorSlot(name, "F32", tuple(scale.shape)) for name, scale in scales.items()]
        (out.partial / ACTIVATION_SCALES).parent.mkdir(parents=True, exist_ok=True)
        writer = out.shard(ACTIVATION_SCALES, layout(slots, {"format": "pt", "activations": "static"}))
        for name, scale in scales.items():
            writer.write(name, 0, scale.contiguous().view(torch.uint8))
        out.finish(writer)

    def summary(self) -> dict[str, Any]:
        """For the closing summary: how much was seen, and the layers with the worst outliers."""
        found: dict[str, Any] = {
            "data": f"{self.calibration.data}: {self.tokens} tokens",
            "layers": f"{len(self.files)} of {len(_modules(self.plan))} rounded for their output",
            "activations": self.calibration.activations,
        }
        if self.resumed:
            found["continued"] = f"{self.resumed} blocks were finished by an earlier run"
        worst = sorted(self.inputs.items(), key=lambda item: -item[1].outlier_ratio())
        for number, (module, seen) in enumerate(worst[:5], start=1):
            ratio = f"{float(seen.amax.amax()):.3g}, {seen.outlier_ratio():.0f}x the median channel"
            found[f"outlier {number}"] = f"input of {module}: absmax {ratio}"
        found |= {f"note {number}": note for number, note in enumerate(self.notes, start=1)}
        return found


def run(
    source: Source,
    plan: Plan,
    calibration: Calibration,
    device: torch.device,
    progress: Progress | None = None,
    *,
    folder: Path | None = None,
    trust_remote_code: bool = False,
) -> Statistics | Rounded:
    """Run the calibration data through the model, one block of it in memory.

    folder  where finished blocks are kept, for an interrupted run to continue from; None: a temporary one

    Raises UsageError for data that does not serve and PreflightError for a model that cannot take it: one that
    transformers cannot build, reads no text, or gives activations that are not finite.
    """
    if calibration.activations == "static" and getattr(plan.stored.input, "block", None) != (1, GROUP):
        scheme = plan.recipe.scheme
        raise UsageError(f"static activations have a scale per group of {GROUP}; use fp8-block, not {scheme}")
    if calibration.optional and device.type == "cpu":
        _check_work(source, plan)
    # on a CPU float32 is faster than bfloat16, and at least as exact
    dtype = torch.float32 if device.type == "cpu" else None
    lazy = LazyModel(source, device, dtype, trust_remote_code=trust_remote_code)
    if getattr(lazy.model, "main_input_name", "input_ids") != "input_ids":
        raise PreflightError(
            f"{source.model}: calibration runs text through a model, this one takes {lazy.model.main_input_name}; "
            f"leave out --calib, --effort and --steps"
        )
    windows = _windows(source, lazy, calibration, trust_remote_code)
    wanted, listed = _wanted(lazy, plan), blocks_of(lazy.model)
    steps = steps_of(plan.stored, calibration)
    if steps is not None:
        if listed is None:
            raise PreflightError(f"{source.model}: has no one list of repeated blocks; use --steps rtn")
        kept = folder or _temporary_folder()
        return sequential.Sequential(lazy, plan, calibration, windows, listed, wanted, kept, progress).run(steps)
    reasons = [] if listed else ["the model ran as a whole (it has no one list of repeated blocks)"]
    asked = calibration.effort == "best" or any(getattr(calibration, step) for step in STEPS)
    if asked and plan.stored.weight.format is not INT4:
        reasons.append(f"effort and steps are of INT4, {plan.recipe.scheme} takes one pass over the original model")
    for blocks in dict.fromkeys((listed, None)):
        kept = folder or _temporary_folder()
        statistics = Statistics(plan, calibration, windows.numel(), kept, digest(windows), notes=list(reasons))
        if folder is None:
            weakref.finalize(statistics, shutil.rmtree, kept, ignore_errors=True)
        try:
            _observe(statistics, lazy, windows, blocks, wanted, progress)
        except torch.OutOfMemoryError:
            raise PreflightError(
                f"{source.model}: calibration ran out of memory on {device}; use --device cpu"
            ) from None
        except CaptureError as error:
            lazy.release("")
            reasons.append(f"the model ran as a whole ({error})")
            continue
        _note_unseen(statistics)
        return statistics
    raise PreflightError(f"{source.model}: does not run on text, leave out --calib: {reasons[-1]}")


def kept_bytes(plan: Plan, calibration: Calibration) -> int:
    """What `run` lays down, about: rounded codes where blocks are quantized one after the other, else K x 128 floats of
    a layer with K inputs, which layers with the same input share."""
    if steps_of(plan.stored, calibration) is not None:
        return sum(bytes_after(decision) for decision in plan.quantized)
    return sum(decision.info.elements // decision.info.shape[-2] * 128 * 4 for decision in plan.quantized)


def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="quantlab-calibration-"))


def steps_of(stored: Stored, calibration: Calibration) -> Steps | None:
    """What is done to each block under this calibration; None where one pass over the original model is all."""
    steps = {step for step in STEPS if calibration.switched(step)}
    if stored.weight.format is not INT4 or not steps:
        return None
    return Steps(
        input=stored.input,
        gptq=(FAST if calibration.effort == "fast" else Gptq()) if "gptq" in steps else None,
        original="original" in steps,
        smooth=EXPONENTS if "smooth" in steps else (),
        tune=Tune(steps=calibration.tune_steps) if "tune" in steps else None,
        rotate="rotate" in steps,
    )


def blocks_of(model: Any) -> str | None:
    """Path of the blocks that text goes through: a model of several modalities has other towers beside them."""
    decoder = None if model.config.is_encoder_decoder else model.get_decoder()
    paths = {module: path for path, module in model.named_modules()}
    if decoder is None or not paths.get(decoder):
        return find_blocks(model)
    inner = find_blocks(decoder)
    return None if inner is None else f"{paths[decoder]}.{inner}"


def _windows(source: Source, lazy: LazyModel, calibration: Calibration, trust_remote_code: bool) -> Tensor:
    context, length, count = context_length(source.config), calibration.length, calibration.count
    if calibration.optional:
        length = min(length, context or length)
        if calibration.samples is None and lazy.device.type == "cpu":
            count //= CPU_SHARE
    if context is not None and length > context:
        raise UsageError(
            f"calibration of {length} tokens a sequence: {source.model} has a context of {context}; "
            f"give --calib-length {context}"
        )
    try:
        tokenizer = data.load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
        windows = data.windows(
            calibration.data,
            tokenizer,
            "calibration",
            count=count,
            length=length,
            seed=calibration.seed,
            fewest=1 if calibration.data == "bundled" else None,
        )
    except data.DataError as error:
        raise UsageError(str(error)) from None
    size = lazy.model.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= size:
        raise UsageError(f"{source.model}: its tokenizer gives token {int(windows.max())}, the model has {size}")
    return windows


def _check_work(source: Source, plan: Plan) -> None:
    """Raise PreflightError for a model that would keep a CPU busy for longer than `fast` should."""
    weights = sum(math.prod(info.shape) for decision in plan.quantized for _, info in decision.parts)
    if weights > CPU_WEIGHTS:
        raise PreflightError(
            f"{source.model}: calibration of {weights / 1e9:.1f} billion weights takes long on a CPU; use a GPU, or "
            f"--effort default"
        )


def _modules(plan: Plan) -> list[str]:
    """All quantized matrices, by the names that they get: each expert of a fused tensor is one."""
    return [module for decision in plan.quantized for module, _ in decision.parts]


def _wanted(lazy: LazyModel, plan: Plan) -> dict[str, list[str]]:
    """Name of a linear layer as `capture` gives it -> the modules of the quantized checkpoint that read its input."""
    wanted: dict[str, list[str]] = {}
    parameters = dict(lazy.model.named_parameters(remove_duplicate=False))
    targets = load_targets(lazy.model, [d.tensor for d in plan.quantized])
    for decision in plan.quantized:
        if decision.tensor not in targets:
            continue
        name = targets[decision.tensor].parameter
        for module, _ in decision.parts:
            expert = re.search(r"experts\.(\d+)\.", module)
            fused = expert and name in parameters and parameters[name].ndim == 3
            wanted.setdefault(f"{name}[{expert[1]}]" if expert and fused else name, []).append(module)
    return wanted


def _observe(
    statistics: Statistics,
    lazy: LazyModel,
    windows: Tensor,
    blocks: str | None,
    wanted: dict[str, list[str]],
    progress: Progress | None,
) -> None:
    paths = [f"{blocks}.{i}" for i in range(len(lazy.model.get_submodule(blocks)))] if blocks else [""]
    batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
    statistics.folder.mkdir(parents=True, exist_ok=True)
    finished = {path for path in paths if _recall(statistics, path, wanted)}
    statistics.resumed = len(finished)
    if len(finished) == len(paths):
        return
    walk = capture(lazy.model, batches, lazy, device=lazy.device, blocks=blocks, unobserved=finished)
    for number, block in enumerate(walk, start=1):
        if block.path not in finished:
            _keep(statistics, block, wanted)
            _recall(statistics, block.path, wanted)
        if progress is not None:
            progress(f"calibrating {block.path or 'the model'}", number, len(paths))


def _file(statistics: Statistics, block: str) -> Path:
    return statistics.folder / f"{block or 'model'}.safetensors"


def _keep(statistics: Statistics, block: Captured, wanted: dict[str, list[str]]) -> None:
    """Reduce what was seen of one block to statistics, and lay them down in its file."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # layers that share an observer share its statistics
    about: dict[str, tuple[str, int]] = {}
    for name, observer in block.inputs.items():
        if name not in wanted:
            continue
        shared = names.setdefault(id(observer), name)
        about[name] = shared, observer.tokens
        if shared != name:
            continue
        seen = ChannelStatistics.of(observer)
        if not bool(seen.amax.isfinite().all()):
            raise PreflightError(
                f"{name}: its input is not finite on the calibration data; the model or its dtype is broken"
            )
        tensors |= {f"{name}.amax": seen.amax, f"{name}.squares": seen.energy}
        if seen.tokens >= FEWEST_TOKENS:
            feedback = Feedback.of(observer.moments()).to(torch.device("cpu"))
            tensors |= {f"{name}.pass_on": feedback.pass_on, f"{name}.energy": feedback.energy}
    temporary = _file(statistics, block.path).with_suffix(".part")
    save_file(tensors, temporary, {"data": statistics.digest, "about": json.dumps(about)})
    temporary.replace(_file(statistics, block.path))


def _recall(statistics: Statistics, block: str, wanted: dict[str, list[str]]) -> bool:
    """Take up what is kept of a block; False where nothing is, or of other data."""
    path = _file(statistics, block)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("data") != statistics.digest:
                return False
            for name, (shared, tokens) in json.loads(metadata["about"]).items():
                amax, energy = (file.get_tensor(f"{shared}.{what}") for what in ("amax", "squares"))
                for module in wanted[name]:
                    statistics.inputs[module] = ChannelStatistics(amax, energy, tokens)
                    if tokens >= FEWEST_TOKENS:
                        statistics.files[module] = (path, shared)
    except (OSError, SafetensorError, KeyError, ValueError):
        return False
    return True


def _note_unseen(statistics: Statistics) -> None:
    modules = _modules(statistics.plan)
    unseen = [module for module in modules if module not in statistics.inputs]
    few = [module for module in modules if module in statistics.inputs and module not in statistics.files]
    if unseen:
        statistics.notes.append(f"{len(unseen)} layers saw no data and are rounded plainly: {unseen[0]}, ...")
    if few:
        least = min(statistics.inputs[module].tokens for module in few)
        what = f"under {FEWEST_TOKENS} tokens (as few as {least})"
        statistics.notes.append(f"{len(few)} layers saw {what} and are rounded plainly: {few[0]}, ...")
