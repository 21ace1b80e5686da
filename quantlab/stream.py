"""Shard by shard from the source to the output, never holding the model.

The output's shards are laid out first, so that every tensor has its place before any work; then worker threads take
pieces in order (torch and file I/O release the interpreter lock). A shard whose pieces are all written is brought to
the disk and entered in the journal while the next ones are being worked on.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from quantlab.checkpoint import INDEX, SINGLE, module_of
from quantlab.errors import UsageError
from quantlab.jobs import PIECE_ELEMENTS, Copy, Job, Lane, Piece, Quantize, QuantizeStack, Replace
from quantlab.output import Output, ShardWriter
from quantlab.preflight import Plan
from quantlab.shards import ShardReader, TensorSlot, layout
from quantlab.summary import Progress
from quantlab_kernels.qtensor import QuantizedTensor

SHARD_BYTES = 2_000_000_000
GPU_LANES = 8
Rounded = Callable[[str, Tensor, int], QuantizedTensor | None]


def convert(
    plan: Plan,
    output: Output,
    *,
    device: torch.device,
    workers: int | None = None,
    progress: Progress | None = None,
    rounded: Rounded | None = None,
    replacements: Mapping[str, Tensor] | None = None,
    added: Sequence[Job] = (),
) -> dict[str, float]:
    """Carry out the plan's decisions; shards that the output has finished before are not made again.

    rounded  (module, rows of its weight, number of the first) -> those rows quantized; None, or no such function,
             rounds to nearest
    replacements  tensors of the source that are not quantized, but are no longer what they were
    added    tensors that the source does not have

    Returns seconds spent reading, quantizing and writing, summed over the workers.
    """
    return run(
        [*_jobs(plan, rounded, replacements or {}), *added],
        plan.source.reader,
        output,
        device=device,
        workers=workers,
        progress=progress,
    )


def _jobs(plan: Plan, rounded: Rounded | None, replacements: Mapping[str, Tensor]) -> Iterator[Job]:
    stored = plan.stored
    for decision in plan.decisions:
        if decision.tensor in replacements:
            yield Replace(decision.info, replacements[decision.tensor])
        elif decision.scheme is None:
            yield Copy(decision.info, decision.tensor)
        if decision.stack is not None:
            yield QuantizeStack(decision.stack, stored, rounded)
        else:
            for module, part in decision.parts:
                yield Quantize(part, module, stored, partial(rounded, module) if rounded else None)


@dataclass
class Shard:
    """One file of the output and the jobs that fill it."""

    name: str
    jobs: list[Job]
    slots: list[TensorSlot]
    writer: ShardWriter | None = None
    _left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, output: Output, elements: int) -> list[tuple[str, int, Piece]]:
        """Create the file; (tensor, bytes, piece) of all that is to be done, in pieces of about so many elements."""
        work = [(job.info.name, nbytes, piece) for job in self.jobs for nbytes, piece in job.pieces(elements)]
        self.writer = output.shard(self.name, layout(self.slots, {"format": "pt"}))
        self._left = len(work)
        if not work:
            output.finish(self.writer)
        return work

    def piece_done(self) -> bool:
        """Count a piece; True for the last one."""
        with self._lock:
            self._left -= 1
            return self._left == 0


def pack(jobs: Sequence[Job], limit: int = SHARD_BYTES) -> list[Shard]:
    """Jobs in order into shards of at most `limit` bytes; a job's tensors stay together."""
    groups: list[tuple[list[Job], list[TensorSlot]]] = []
    room = -1
    for job in jobs:
        size = sum(slot.nbytes for slot in job.slots)
        if size > room:
            groups.append(([], []))
            room = limit
        groups[-1][0].append(job)
        groups[-1][1].extend(job.slots)
        room -= size
    total = len(groups)
    names = [SINGLE] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    return [Shard(name, *group) for name, group in zip(names, groups, strict=True)]


def run(
    jobs: Sequence[Job],
    reader: ShardReader,
    output: Output,
    *,
    device: torch.device,
    workers: int | None = None,
    progress: Progress | None = None,
    shard_bytes: int | None = None,
) -> dict[str, float]:
    """Do all jobs, write their shards and the index. Returns seconds by stage, summed over the workers."""
    shards = pack(jobs, shard_bytes or SHARD_BYTES)
    workers = default_workers(device) if workers is None else workers
    if workers < 1:
        raise UsageError(f"workers = {workers}: needs at least one")
    lanes = _Lanes(reader, device)
    before = torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what calibration computed is read from other streams now
    try:
        _work(shards, lanes, output, workers, progress)
    finally:
        torch.set_num_threads(before)  # lanes set it to one; threads that start later would inherit that
        reader.close()
    _write_index(shards, output)
    return lanes.seconds()


def pick_device(name: str) -> torch.device:
    """The device that a user named; "auto" is a GPU where there is one. Raises UsageError for one that is not there."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}: known are auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"device {name!r}: there is no such GPU (found {count}); use cpu")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise UsageError(f"device {name!r}: known are auto, cpu, cuda, cuda:N")
    return device


def default_workers(device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, GPU_LANES if device.type == "cuda" else 16))


class _Lanes:
    """A lane for each worker thread, made in that thread."""

    def __init__(self, reader: ShardReader, device: torch.device) -> None:
        self._reader, self._device = reader, device
        self.piece_elements = PIECE_ELEMENTS[device.type]
        self._local = threading.local()
        self._all: list[Lane] = []

    def enter(self) -> None:
        """Prepare the calling thread: one core each, and on a GPU a stream each, so that lanes overlap."""
        torch.set_num_threads(1)
        self._local.lane = Lane(self._reader, self._device)
        self._all.append(self._local.lane)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(torch.cuda.Stream(self._device))

    def run(self, piece: Piece, shard: Shard, output: Output) -> None:
        """Do one piece; whoever does the last one of a shard finishes the shard."""
        assert shard.writer is not None
        lane: Lane = self._local.lane
        with torch.inference_mode():
            piece(lane, shard.writer.write)
        if shard.piece_done():
            with lane.clock("write"):
                output.finish(shard.writer)

    def seconds(self) -> dict[str, float]:
        return {stage: sum(lane.seconds[stage] for lane in self._all) for stage in ("read", "quantize", "write")}


def _work(shards: list[Shard], lanes: _Lanes, output: Output, workers: int, progress: Progress | None) -> None:
    meter = _Meter(sum(job.info.nbytes for shard in shards for job in shard.jobs), progress)
    pending: dict[Future[None], tuple[str, int]] = {}
    pool = ThreadPoolExecutor(workers, thread_name_prefix="quantlab", initializer=lanes.enter)
    try:
        for shard in shards:
            if shard.name in output.finished:
                meter.add(shard.jobs[-1].info.name, sum(job.info.nbytes for job in shard.jobs))
                continue
            for name, nbytes, piece in shard.begin(output, lanes.piece_elements):
                while len(pending) >= 3 * workers:
                    _collect(pending, meter)
                pending[pool.submit(lanes.run, piece, shard, output)] = (name, nbytes)
        while pending:
            _collect(pending, meter)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for shard in shards:
            if shard.writer is not None:
                shard.writer.discard()


def _collect(pending: dict[Future[None], tuple[str, int]], meter: _Meter) -> None:
    """Wait for a piece. Where pieces failed, raise the error of the first in order, whichever came first in time."""
    finished, _ = wait(pending, return_when=FIRST_COMPLETED)
    if any(future.exception() for future in finished):
        for future in pending:
            future.cancel()
        wait(pending)
        raise next(error for f in pending if not f.cancelled() and (error := f.exception()))
    for future in finished:
        meter.add(*pending.pop(future))


class _Meter:
    """Progress by bytes of the source, with the layer that the furthest finished piece belongs to."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._layers: dict[str, None] = {}

    def add(self, tensor: str, nbytes: int) -> None:
        self._done += nbytes
        layer = re.match(r"(?:\w+\.)*?\w*layers?\.\d+|(?:\w+\.)+?\d+|", tensor)
        self._layers.setdefault((layer and layer[0]) or module_of(tensor) or tensor)
        if self._progress is not None:
            self._progress(next(reversed(self._layers)), self._done, self._total)


def _write_index(shards: list[Shard], output: Output) -> None:
    if len(shards) == 1:
        return
    weight_map = {slot.name: shard.name for shard in shards for slot in shard.slots}
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    output.write_text(INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
