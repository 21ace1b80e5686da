"""What ``quantlab bench`` times: rooms of kernels, collections of them, and whole jobs on random weights.

Random weights have a real model's sizes, so times are right; its text and its quality are not, and are not reported.
"""

from __future__ import annotations

import fcntl
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import UsageError
from quantlab.generation_benchmark import generation
from quantlab.random_models import checkpoint, holding_gpu, shape_named, without_data, work_folder
from quantlab.scheme import did_you_mean
from quantlab.summary import Summary, Table

HEADER = ("case", "backend", "us", "TFLOP/s", "GB/s", "of the roofline", "time of others over ours")
# name -> its rooms, and the module that measures them at work
COLLECTIONS = {
    "attention": (("attention_quantize", "attention_prefill"), "quantlab.attention_benchmark"),
    "mla": (("mla_append", "mla_decode"), "quantlab.latent_benchmark"),
    "moe": (("gemm_fp8_grouped", "gemm_int4_grouped"), "quantlab.moe_benchmark"),
}


def kernel_room(room: str, dry_run: bool, *, only: str = "", unchecked: bool = False, sustained: float = 0.0) -> Table:
    """Time a kernel room or a collection on the present GPU, or list what would be timed after a small call of it.

    only       cases whose name contains this; nothing else is measured
    unchecked  times without the rooms' tests, for a run right after them
    sustained  seconds that each variant of a kernel runs by itself before it is timed; 0: they take turns

    Raises UsageError for an unknown room, where no case is left, and for times without a GPU.
    """
    import torch

    from quantlab_kernels import bench

    if room not in COLLECTIONS and room not in bench.ROOMS:
        known = [*bench.ROOMS, *COLLECTIONS, *JOBS]
        raise UsageError(f"unknown benchmark {room!r}; {did_you_mean(room, known)}")
    members, module = COLLECTIONS.get(room, ((room,), None))
    rooms = [each for each in members if any(only in case.name for case in bench.cases(each))]
    at_work: Any = importlib.import_module(module) if module else None
    wanted = at_work.cases(only) if at_work else []
    if not rooms and not wanted:
        raise UsageError(f"{room}: no case contains {only!r}; --dry-run without --case lists them")
    if dry_run:
        names = [name for each in rooms for name in bench.dry_run(each, only)]
        if wanted:
            at_work.dry_run()
        return f"{room}: inputs build, it runs", ("case",), [(name,) for name in names + wanted]
    if wanted and not torch.cuda.is_available():
        raise UsageError(bench.NO_GPU)
    rows = [row for each in rooms for row in _room(each, only, unchecked=unchecked, sustained=sustained)]
    return room, HEADER, rows + (list(at_work.run(only)) if wanted else [])


def _room(room: str, only: str, **given: Any) -> Iterator[tuple[Any, ...]]:
    """Rows of a room that has such cases."""
    from quantlab_kernels import bench

    try:
        rows = list(bench.run(room, only=only, **given))
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    for row in rows:
        share = "" if row.roofline is None else f"{row.roofline:.0%}"
        figures = (f"{row.us:.1f}", f"{row.tflops:.0f}", f"{row.gb_per_s:.0f}", share)
        yield row.case, row.backend, *figures, bench.times_ours(row.ratios())
    yield f"geometric mean of {len(rows)}", "", *4 * [""], bench.times_ours(bench.means(rows))


def tune(room: str, shapes: list[tuple[int, int]]) -> Path:
    """Search the best configurations of a room on the present GPU; returns the table that was written."""
    from quantlab_kernels import tune as tuner

    try:
        return tuner.tune(room, shapes)
    except (RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from None


def conversion(shape: str, schemes: Sequence[str], workdir: Path | None, **_: Any) -> Table:
    """Make a random checkpoint of this shape, quantize it to each scheme, and say what each stage took."""
    from quantlab.pipeline import quantize

    wanted, columns = shape_named(shape), []
    with work_folder(workdir) as folder:
        with holding_gpu(fcntl.LOCK_SH):
            source = checkpoint(wanted, folder / shape)
        for scheme in schemes:
            with holding_gpu(fcntl.LOCK_EX):
                summary = quantize(source, without_data(scheme), folder / f"{shape}-{scheme}", overwrite=True)
            columns.append(_figures(summary))
    rows = [(what, *(column.get(what, "") for column in columns)) for what in columns[0]]
    return f"conversion of {shape}", ("what", *schemes), rows


def _figures(summary: Summary) -> dict[str, str]:
    return {
        "whole run, seconds": f"{summary.seconds:.1f}",
        "source, GB": f"{summary.bytes_before / 1e9:.2f}",
        "output, GB": f"{summary.bytes_after / 1e9:.2f}",
        "device": summary.device,
        **{f"{stage}, share of the workers' time": f"{share:.0%}" for stage, share in summary.shares().items()},
        **{f"peak memory of the {where}, GB": f"{n / 1e9:.2f}" for where, n in summary.peak_bytes.items()},
    }


JOBS: dict[str, Callable[..., Table]] = {"conversion": conversion, "generation": generation}
