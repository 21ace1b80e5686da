"""Time of GPU work: CUDA graphs, cold inputs, variants interleaved, medians with quartiles.

A graph takes Python's launch overhead out. Inputs rotate through more memory than the L2 holds, as a model's weights
do. Variants are timed in turns, so that clocks that drift under load touch all of them alike. Inputs must be real
data: zeros draw less power and run faster.

Kernels that draw as much power as the GPU may slow each other down in turns: what draws less then runs at the clock
that another one has left it. Sustained times are of each by itself, at the clock that it can keep.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
_LEAST_CALLS = 16  # in one timed region: events resolve half a microsecond


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and quartiles over rounds. graph: False where capture failed, see `note`."""

    median_us: float
    low_us: float
    high_us: float
    graph: bool = True
    note: str = ""


def rotations(bytes_per_call: int, l2_bytes: int) -> int:
    """How many input sets make a rotation that the L2 cannot hold: at least 2, at most 64."""
    return max(2, min(64, -(-3 * l2_bytes // max(bytes_per_call, 1))))


def measure(variants: Mapping[str, Sequence[Call]], *, rounds: int = 15, sustained: float = 0.0) -> dict[str, Timing]:
    """Time each variant, a sequence of calls that do the same work on different inputs; per call.

    sustained  seconds that each runs by itself before it is timed, not in turns with others; 0: in turns

    Needs a CUDA device. Each call is made once before, so compilation is not timed, and weights are settled.
    """
    regions = {name: _region(calls) for name, calls in variants.items()}
    if sustained > 0:
        return {
            name: _timing(_after(sustained, region, calls, rounds), note)
            for name, (region, calls, note) in regions.items()
        }
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for lead, _, _ in list(regions.values())[:1]:
            lead()  # untimed: the device has work while the host gets ahead, so that no region waits for a launch
        marks = {}
        for name, (region, _, _) in regions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            region()
            end.record()
            marks[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in marks.items():
            samples[name].append(start.elapsed_time(end) * 1e3 / regions[name][1])
    return {name: _timing(samples[name], regions[name][2]) for name in variants}


def _after(seconds: float, region: Call, calls: int, rounds: int) -> list[float]:
    """Microseconds of a call, once its region has run for so long."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(8):  # the device waits for the host once in so many
            region()
        torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    region()  # untimed: the device has work while the host gets ahead
    marks[0].record()
    for mark in marks[1:]:
        region()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 / calls for start, end in itertools.pairwise(marks)]


def _region(calls: Sequence[Call]) -> tuple[Call, int, str]:
    """What one timed region runs, how many calls that is, and why it is not a graph (or "")."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # all: a weight's first launch waits for the kernel before, later ones do not
            call()
    calls = list(calls) * -(-_LEAST_CALLS // len(calls))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def run() -> None:
        for call in calls:
            call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return run, len(calls), str(error).splitlines()[0]
    graph.replay()
    return graph.replay, len(calls), ""


def _timing(samples: list[float], note: str) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, low, high, not note, note)
