"""From one on-disk format to another, without rounding anything twice: the codes stay, scales get their other name.

Back to bf16 the codes are multiplied out; with power-of-two scales that is exact.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantlab import checkpoint, stream
from quantlab.checkpoint import ACTIVATION_SCALES, SUMMARY, WEIGHT, Source, Stored, module_of
from quantlab.errors import UsageError, VerificationError
from quantlab.jobs import Copy, Dequantize, Job, Widen
from quantlab.output import Output, check_outside, check_space, check_writable, fingerprint, output_folder
from quantlab.scheme import did_you_mean
from quantlab.summary import Summary
from quantlab.verify import verify_weights

if TYPE_CHECKING:
    from quantlab.stream import Progress

LAYOUTS = {"fp8": "fp8", "compressed-tensors": "float-quantized", "bf16": None}


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
    """Rewrite a quantized checkpoint as "fp8" (Hugging Face), "compressed-tensors" or "bf16".

    Streams like `quantize`: bounded memory, resumable, and the output appears only when it is whole. Raises UsageError
    for a format that cannot hold these weights.
    """
    start = time.perf_counter()
    if to not in LAYOUTS:
        raise UsageError(f"unknown format {to!r}; {did_you_mean(to, LAYOUTS)}")
    source = Source.open(folder)
    stored = checkpoint.stored_in(source.config)
    if stored is None:
        raise UsageError(f"{folder}: is not quantized; `quantlab quantize` makes quantized checkpoints")
    target = _target(source, stored, to)
    jobs = list(_jobs(source, stored, target))
    destination = output_folder(folder, to, output)
    where = stream.pick_device(device)
    bytes_after = sum(slot.nbytes for job in jobs for slot in job.slots)
    check_writable(destination, overwrite=overwrite)
    check_outside(destination, source.folder)
    check_space(destination, bytes_after)

    with Output.open(destination, fingerprint(source, to), overwrite=overwrite) as out:
        resumed = out.finished_shards
        stages = stream.run(jobs, source.reader, out, device=where, workers=workers, progress=progress)
        checkpoint.write_side_files(out, source, target)
        if target and (source.folder / ACTIVATION_SCALES).is_file():
            out.copy_file(source.folder / ACTIVATION_SCALES, ACTIVATION_SCALES)
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
        )
        out.write_text(SUMMARY, checkpoint.to_json(summary.to_dict()))
        out.publish()
    return summary


def _target(source: Source, stored: Stored, to: str) -> Stored | None:
    """How the weights will be stored; None for not quantized."""
    layout = LAYOUTS[to]
    if layout is None:
        return None
    if layout == stored.layout:
        raise UsageError(f"{source.model}: is already in the format {to}")
    if layout == "fp8" and min(stored.weight.block) < 2:
        raise UsageError(
            f"{source.model}: has a scale per row; the format fp8 holds blocks, so keep compressed-tensors"
        )
    return replace(stored, layout=layout)


def _jobs(source: Source, stored: Stored, target: Stored | None) -> Iterator[Job]:
    """A job for every tensor; scales that go into a weight have none of their own."""
    scales = {name for name in source.tensors if name.endswith(stored.scale_suffix)}
    for name, info in source.tensors.items():
        module = module_of(name)
        scale = module + stored.scale_suffix
        if name in scales and target is not None:
            yield Widen(info, module + target.scale_suffix)
        elif name.endswith(WEIGHT) and scale in scales and target is None:
            yield Dequantize(info, source.tensors[scale], module, stored, torch.bfloat16)
        elif name not in scales:
            yield Copy(info, name)


def _groups(jobs: list[Job]) -> dict[str, tuple[int, int]]:
    names = {Copy: "copied", Widen: "scales renamed", Dequantize: "multiplied out"}
    groups: dict[str, tuple[int, int]] = {}
    for job in jobs:
        count, nbytes = groups.get(names[type(job)], (0, 0))
        groups[names[type(job)]] = (count + 1, nbytes + job.info.nbytes)
    return groups
