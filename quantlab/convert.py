"""From one on-disk format to another, without rounding anything twice: the codes stay, scales get their other name.

Back to bf16 the codes are multiplied out; with power-of-two scales that is exact.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from quantlab import checkpoint, keys, stream
from quantlab.architecture import meta_model
from quantlab.checkpoint import (
    ACTIVATION_SCALES,
    KV_SCALES,
    ORDER,
    PACKED,
    RECIPE,
    SHAPE,
    STACK_SCALE,
    SUMMARY,
    Stored,
    module_of,
)
from quantlab.errors import UsageError, VerificationError
from quantlab.fused_experts import flat
from quantlab.jobs import Copy, Dequantize, Job, Replace, Widen
from quantlab.loaders import View, broken_rules, not_written_yet
from quantlab.output import Output, check_outside, check_space, check_writable, fingerprint, output_folder, to_json
from quantlab.preflight import known_architecture
from quantlab.scheme import SCHEMES, Recipe, did_you_mean
from quantlab.shards import TensorInfo
from quantlab.source import Source
from quantlab.summary import Progress, Summary
from quantlab.verify import verify_weights
from quantlab_kernels.formats import INT4

LAYOUTS = {"fp8": "fp8", "compressed-tensors": "float-quantized", "bf16": None}
FLIPS = ("int4", "int4-fp8")  # the same weights, other activations: only config.json differs
AGAIN = "get the checkpoint again; `quantlab verify` says all that is wrong with it"


def convert(
    folder: str | Path,
    to: str,
    output: str | Path | None = None,
    *,
    device: str = "cpu",
    workers: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Summary:
    """Rewrite a quantized checkpoint as "fp8" (Hugging Face), "compressed-tensors" or "bf16", or INT4 weights for
    other activations: as "int4" (16-bit) or "int4-fp8".

    What was measured on keys comes along, and the scales of an FP8 KV cache where the format has a place for them.
    Streams like `quantize`: bounded memory, resumable, and the output appears only when it is whole. Raises UsageError
    for a format that cannot hold these weights.
    """
    start = time.perf_counter()
    if to not in LAYOUTS and to not in FLIPS:
        raise UsageError(f"unknown format {to!r}; {did_you_mean(to, [*LAYOUTS, *FLIPS])}")
    source = Source.open(folder)
    stored = source.stored
    if stored is None:
        raise UsageError(f"{folder}: is not quantized; `quantlab quantize` makes quantized checkpoints")
    kept = source.folder / RECIPE
    recipe = Recipe.from_toml(kept) if kept.is_file() else None
    known, fits = keys.beside(source.folder)
    view = View(source, stored, known_architecture(source)[0])
    target, scales = _with_kv(view, _target(view, to), known, recipe)
    jobs = [*_jobs(view, target), *scales]
    if target:
        _check_rules(replace(view, stored=target), jobs)
    recipe = _recipe(recipe, to) if target and recipe else None
    destination = output_folder(folder, to, output)
    where = stream.pick_device(device)
    bytes_after = sum(slot.nbytes for job in jobs for slot in job.slots)
    check_writable(destination, overwrite=overwrite)
    check_outside(destination, source.folder)
    check_space(destination, bytes_after)

    with Output.open(destination, fingerprint(source, [to, len(scales)]), overwrite=overwrite) as out:
        resumed = out.finished_shards
        stages = stream.run(jobs, source.reader, out, device=where, workers=workers, progress=progress)
        out.write_side_files(source, target)
        if target and (source.folder / ACTIVATION_SCALES).is_file():
            out.copy_file(source.folder / ACTIVATION_SCALES, ACTIVATION_SCALES)
        if recipe is not None:
            out.write_text(RECIPE, recipe.to_toml())
        if known:
            keys.keep(out, known)
        problems = verify_weights(out.partial) if target else []
        if problems:
            raise VerificationError(f"{destination}: what was written is wrong, nothing is kept: {problems[0]}")
        summary = Summary(
            output=str(destination),
            scheme=to,
            bytes_before=source.weight_bytes,
            bytes_after=bytes_after,
            groups=_groups(jobs),
            tensor_parallel=None,
            seconds=time.perf_counter() - start,
            stages=stages,
            device=str(where),
            resumed=resumed,
            warnings=tuple(_left_behind(stored, target, known, fits)),
        )
        out.write_text(SUMMARY, to_json(summary.to_dict()))
        out.publish()
    return summary


def _left_behind(
    stored: Stored, target: Stored | None, known: dict[int, keys.Keys] | None, fits: bool
) -> Iterator[str]:
    """What the source knows of its KV cache and the target does not."""
    if not fits:
        yield "key statistics were measured on other weights and stay behind"
    if stored.kv and not known and (target is None or not target.kv):
        yield "the scales of the KV cache stay behind: this format has no place for them"


def _recipe(recipe: Recipe, to: str) -> Recipe:
    """The recipe of the same weights after a conversion: its KV cache stays, INT4 schemes are what they are now."""

    def name(scheme: str) -> str:
        return to if scheme in FLIPS and to in FLIPS else scheme

    rules = tuple(replace(rule, scheme=name(rule.scheme)) for rule in recipe.rules)
    return replace(recipe, scheme=name(recipe.scheme), rules=rules)


def _check_rules(view: View, jobs: list[Job]) -> None:
    """What would be written has to pass the rules of all loaders."""
    for problem, _ in broken_rules(not_written_yet(view, (slot for job in jobs for slot in job.slots))):
        raise UsageError(f"{view.source.model}: the result would not load everywhere: {problem}")


def _with_kv(
    view: View, target: Stored | None, known: dict[int, keys.Keys] | None, recipe: Recipe | None
) -> tuple[Stored | None, tuple[Replace, ...]]:
    """The target with what is known of the KV cache, and scales for it that the source does not have.

    `fp8` has no field that speaks of the cache, and transformers complains of tensors that no layer takes: there the
    scales stay behind, and come back from the key statistics.
    """
    source, stored, architecture = view.source, view.stored, view.architecture
    found = checkpoint.config_of_quantization(source.config) or {}
    if found.get("kv_cache_scheme") and not stored.kv:
        raise UsageError(
            f"{source.model}: its kv_cache_scheme is not FP8 per tensor, which quantlab does not carry over"
        )
    if target is None or target.layout == "fp8":
        return target and replace(target, kv=False), ()
    if stored.kv or not known or recipe is None or recipe.kv != "fp8":
        return target, ()
    model = meta_model(source.folder)
    modules = [(path, module_of(tensor)) for tensor, path in (architecture.modules if architecture else {}).items()]
    scales = keys.engine_scales(model, known, modules) if model is not None else ()
    return replace(target, kv=bool(scales)), scales


def _target(view: View, to: str) -> Stored | None:
    """How the weights will be stored; None for not quantized. Where there was no skip list, which means the output
    layer to transformers, there is one."""
    source, stored = view.source, view.stored
    if to in FLIPS:
        return _flipped(source, stored, to)
    layout = LAYOUTS[to]
    if layout is None:
        apart = view.architecture.ours if view.architecture else frozenset()
        if apart & {name.removesuffix("_packed") for name in source.tensors}:
            raise UsageError(
                f"{source.model}: holds experts one by one, which transformers does not read in 16 bits; "
                "take the original model"
            )
        return None
    if "pack-quantized" in {kind.layout for kind in stored.kinds}:
        raise UsageError(f"{source.model}: holds INT4 weights; they go to {', '.join(FLIPS)} or bf16")
    if layout == stored.layout:
        raise UsageError(f"{source.model}: is already in the format {to}")
    if layout != "fp8" and view.stacks:
        raise UsageError(
            f"{source.model}: holds all experts of a layer in one tensor, which compressed-tensors has no place for; "
            "keep fp8, or go to bf16"
        )
    if layout == "fp8" and min(stored.weight.block) < 2:
        raise UsageError(
            f"{source.model}: has a scale per row; the format fp8 holds blocks, so keep compressed-tensors"
        )
    return replace(stored, layout=layout, skip=stored.skip or tuple(sorted({*view.plain, *view.plain_linear})))


def _flipped(source: Source, stored: Stored, to: str) -> Stored:
    """The same INT4 weights with the activations of another scheme; kinds that are not INT4 stay as they are."""

    def flip(kind: Stored) -> Stored:
        return replace(kind, input=SCHEMES[to].input) if kind.weight.format is INT4 else kind

    if INT4 not in {kind.weight.format for kind in stored.kinds}:
        raise UsageError(f"{source.model}: holds no INT4 weights; make them with `quantlab quantize --scheme {to}`")
    target = replace(flip(stored), others=tuple((names, flip(kind)) for names, kind in stored.others))
    if target == stored:
        raise UsageError(f"{source.model}: is already in the format {to}")
    broken = next((m for m, info in View(source, stored).quantized.items() if info.shape[0] % SCHEMES[to].rows), None)
    if broken is not None:
        rows = View(source, stored).quantized[broken].shape[0]
        raise UsageError(f"{source.model}: {broken} has {rows} rows, {to} needs a multiple of {SCHEMES[to].rows}")
    return target


def _jobs(view: View, target: Stored | None) -> Iterator[Job]:
    """A job for every tensor; scales that go into a weight have none of their own."""
    source, stored, stacks = view.source, view.stored, view.stacks
    scales = {name for name in source.tensors if name.endswith(stored.scale_suffix)}
    scales |= {name + STACK_SCALE for name in stacks}
    renamed = target is not None and target.layout != stored.layout
    left = KV_SCALES if target is None or not target.kv else ()
    for name, info in source.tensors.items():
        module = module_of(name)
        scale = module + stored.scale_suffix
        if name.endswith(left):
            continue
        if target is not None:
            yield Widen(info, module + target.scale_suffix) if renamed and name in scales else Copy(info, name)
        elif scale in scales and name == module + stored.kind(module).weight_suffix:
            yield _multiplied_out(view, info, source.tensors[scale], module)
        elif name in stacks and name + STACK_SCALE in source.tensors:
            yield _multiplied_out(view, info, source.tensors[name + STACK_SCALE], name)
        elif name not in scales and not name.endswith(SHAPE):
            if info.dtype.startswith("F8_") or name.endswith(PACKED):  # a copy would pass codes off as weights
                raise UsageError(f"{source.model}: {name} holds codes, but there is no scale of it; {AGAIN}")
            if name.endswith(ORDER) and scale in scales:
                raise UsageError(f"{source.model}: {name} reorders columns, but config.json has no actorder; {AGAIN}")
            yield Copy(info, name)


def _multiplied_out(view: View, info: TensorInfo, scale: TensorInfo, module: str) -> Dequantize:
    stored = view.stored.kind(module)
    weight = view.quantized.get(module, flat(info))
    needed, found = stored.weight.scale_shape(weight.shape), flat(scale).shape
    if [size for size in found if size > 1] != [size for size in needed if size > 1]:
        raise UsageError(f"{view.source.model}: {scale.name} is {list(found)}, needs {list(needed)}; {AGAIN}")
    return Dequantize(info, scale, module, stored, torch.bfloat16)


def _groups(jobs: list[Job]) -> dict[str, tuple[int, int]]:
    names = {Copy: "copied", Widen: "scales renamed", Dequantize: "multiplied out", Replace: "scales of the KV cache"}
    groups: dict[str, tuple[int, int]] = {}
    for job in jobs:
        count, nbytes = groups.get(names[type(job)], (0, 0))
        groups[names[type(job)]] = (count + 1, nbytes + job.info.nbytes)
    return groups
