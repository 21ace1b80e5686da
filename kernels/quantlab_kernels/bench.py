"""Benchmark a room: ``python -m quantlab_kernels.bench ROOM [--dry-run] [--case TEXT] [--sustained SECONDS]``.

Prints a line per case and appends the same as JSON to the room's ``results/``. No number is printed while the room's
tests are red: a wrong kernel is not fast. `--dry-run` builds small inputs on any device and calls the reference once,
so that a benchmark that broke is noticed where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.timing import Timing, measure, rotations

PACKAGE = Path(__file__).parent
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/bench.py"))
NO_GPU = "a benchmark needs a CUDA device; --dry-run works without one"


@dataclass(frozen=True)
class Row:
    """What was measured for one case. `roofline`: the share that was reached; `times_us`: every variant."""

    case: str
    backend: str
    us: float
    low_us: float
    high_us: float
    tflops: float
    gb_per_s: float
    roofline: float | None
    times_us: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """How many times our time each other variant takes."""
        return {name: us / self.us for name, us in self.times_us.items() if name != "quantlab"}


def cases(room: str, only: str = "") -> list[Case]:
    """The room's cases whose name contains `only`. Raises ValueError for an unknown room or when none is left."""
    if room not in ROOMS:
        raise ValueError(f"no room {room!r} with a benchmark; there are {', '.join(ROOMS)}")
    found = [case for case in importlib.import_module(f"quantlab_kernels.{room}.bench").cases() if only in case.name]
    if not found:
        raise ValueError(f"{room}: no case contains {only!r}")
    return found


def dry_run(room: str, only: str = "") -> list[str]:
    """Build the inputs of the room's smallest case and call op and reference once, on any device; what would be timed:
    the names of the cases that contain `only`. Raises ValueError as `cases` does."""
    wanted = cases(room, only)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    smallest = min(cases(room), key=lambda case: case.bytes)
    inputs = smallest.build(device, 0)
    smallest.ours(*inputs)
    smallest.reference(*inputs)
    return [case.name for case in wanted]


def run(
    room: str, *, only: str = "", unchecked: bool = False, rounds: int = 15, sustained: float = 0.0
) -> Iterator[Row]:
    """Measure the room's cases on the present GPU and append them to its results.

    Raises RuntimeError without a GPU and when the room's tests fail. `unchecked` skips the tests, for a run right after
    them; the results then say so. `sustained`: as in `timing.measure`.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(NO_GPU)
    everything = cases(room, only)
    if not unchecked:
        check(room)
    about = environment() | {"room": room, "checked": not unchecked, "sustained": sustained}
    path = PACKAGE / room / "results" / f"{gpu().slug}.jsonl"
    path.parent.mkdir(exist_ok=True)
    for case in everything:
        row = measure_case(room, case, rounds, sustained)
        with path.open("a") as file:
            file.write(json.dumps(about | asdict(row)) + "\n")
        yield row


def measure_case(room: str, case: Case, rounds: int = 15, sustained: float = 0.0) -> Row:
    """Time our op, its able backends and the peers on the same inputs."""
    device = torch.device("cuda")
    present = {name: peer for name, peer in case.peers.items() if not isinstance(peer, str)}
    absent = {name: peer for name, peer in case.peers.items() if isinstance(peer, str)}
    backends = {f"quantlab/{name}": call for name, call in case.backends.items()}
    sets = [case.build(device, seed) for seed in range(rotations(case.bytes, gpu().l2_bytes))]
    variants = {"quantlab": case.ours, **backends, **present}
    times = measure({name: _bind(call, sets) for name, call in variants.items()}, rounds=rounds, sustained=sustained)
    return _row(room, case, times, absent)


def _bind(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> list[Callable[[], Any]]:
    return [lambda inputs=inputs: call(*inputs) for inputs in sets]  # type: ignore[misc]


def _row(room: str, case: Case, times: dict[str, Timing], absent: dict[str, str]) -> Row:
    ours, rates = times["quantlab"], gpu().rates
    us = ours.median_us
    op = importlib.import_module(f"quantlab_kernels.{room}.op")
    backend = op.BACKENDS.select(case.problem).__name__.rpartition(".")[2]
    return Row(
        case.name, backend, us, ours.low_us, ours.high_us, case.flops / us / 1e6, case.bytes / us / 1e3,
        case.roofline_us(rates) / us if rates else None, {name: t.median_us for name, t in times.items()}, absent,
    )  # fmt: skip


def check(room: str) -> None:
    """Run the room's tests. Raises RuntimeError when one fails or when they are not there."""
    root = PACKAGE.parent.parent
    families = ("gemm_fp8", "gemm_int4")  # whose rooms have the same tests
    shared = next((family for family in families if room.startswith(family)), room)
    files = sorted((root / "tests" / "ops").glob(f"test_{shared}*.py"))
    if not files:
        raise RuntimeError(f"the tests of {room} are not beside the package; benchmark from a checkout")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--require-gpu", *map(str, files)]
    search = os.pathsep.join(str(root / part) for part in (".", "kernels", "calib"))
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the tests of {room} fail, no number is printed:\n{done.stdout[-2000:]}")


def environment() -> dict[str, Any]:
    """What a number depends on beside the code."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PACKAGE, capture_output=True, text=True)
    try:
        triton = importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        triton = None
    return {
        "gpu": gpu().name, "torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda,
        "commit": os.environ.get("QUANTLAB_COMMIT") or git.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip


def means(rows: Sequence[Row]) -> dict[str, float]:
    """How many times our time each other variant takes, as the geometric mean over the cases that it can run."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for name, ratio in row.ratios().items():
            ratios.setdefault(name, []).append(ratio)
    return {name: statistics.geometric_mean(found) for name, found in ratios.items()}


def times_ours(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())


def line(row: Row) -> str:
    """One case as text: time, rates, share of the roofline, and the time of every other variant as a multiple."""
    ratios = times_ours(row.ratios())
    share = "" if row.roofline is None else f"{row.roofline:5.0%} of roof"
    rates = f"{row.tflops:7.0f} TFLOP/s {row.gb_per_s:6.0f} GB/s"
    return f"{row.case:32} {row.backend:10} {row.us:9.1f} us {rates} {share}  {ratios}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 when the room's tests fail or there is nothing to run on."""
    parser = argparse.ArgumentParser(prog="python -m quantlab_kernels.bench", description="Benchmark a kernel room.")
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="build inputs, call the reference; needs no GPU")
    parser.add_argument("--unchecked", action="store_true", help="skip the room's tests; the results say so")
    parser.add_argument(
        "--sustained", type=float, default=0.0, metavar="SECONDS",
        help="every variant runs by itself for so long before it is timed: times at the clock that it can keep",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if options.dry_run:
            print("\n".join(dry_run(options.room, options.case)))
            return 0
        rows = []
        for row in run(options.room, only=options.case, unchecked=options.unchecked, sustained=options.sustained):
            print(line(row), flush=True)
            rows.append(row)
        print(f"geometric mean of {len(rows)} cases: {times_ours(means(rows))}")
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
