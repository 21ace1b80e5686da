"""Out-of-bounds accesses and races of the CUDA kernels: `python tools/sanitize.py [ROOM ...]`, or `make sanitize`.

Every room of `small_calls.py` runs in processes of its own: first plainly, which compiles its kernels into the caches
on disk, then under each tool of compute-sanitizer. A room fails where the tool reports anything, a result is wrong, or
it takes too long. Exit code 0: every room is clean; 1: some are not; 2: there is no compute-sanitizer.

racecheck sees neither copies through tensor maps nor what warpgroup MMAs read (DECISIONS.md, 0093): what goes wrong
there shows in results.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from small_calls import ROOMS

PLAIN, TOOLS = "plain", ("racecheck", "memcheck")  # the slower one first
FOLDER = Path(__file__).resolve().parent
# "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ERROR SUMMARY: 0 errors"
SUMMARY = re.compile(r"^=+ (?:RACECHECK|ERROR) SUMMARY: (\d+) ", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """One room under one tool; `reason` says why it failed and is empty where it did not."""

    tool: str
    room: str
    seconds: float
    reason: str
    log: Path


@dataclass(frozen=True)
class Settings:
    sanitizer: str
    limit_s: float
    logs: Path


def run(tool: str, room: str, settings: Settings) -> Run:
    """The room in a process of its own, ended with all its children where it takes too long."""
    log, began = settings.logs / f"{tool}-{room}.log", time.monotonic()
    checker = [settings.sanitizer, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
    command = [*([] if tool == PLAIN else checker), sys.executable, str(FOLDER / "small_calls.py"), room]
    # Without torch's cache of memory every tensor is an allocation of its own, whose end memcheck knows.
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent / "kernels"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            code: int | None = process.wait(settings.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    reason = judge(tool, code, log.read_text(errors="replace"), settings.limit_s)
    found = Run(tool, room, time.monotonic() - began, reason, log)
    print(f"{found.seconds:6.1f} s  {tool:9s} {room:24s} {reason or 'clean'}", flush=True)
    return found


def judge(tool: str, code: int | None, output: str, limit_s: float) -> str:
    """Why the run is a failure, or "". A tool that gave no summary did not check."""
    lines = output.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    reports = [line for line in lines if line.startswith("========= ") and "COMPUTE-SANITIZER" not in line]
    counts = [int(count) for count in SUMMARY.findall(output)]
    if any(counts):
        return f"{sum(counts)} reported, the first: {reports[0].removeprefix('========= ')}"
    if wrong:
        return f"{len(wrong)} wrong results, the first: {wrong[0]}"
    if code is None:
        return f"not done after {limit_s:.0f} s; {sum(line.startswith('right') for line in lines)} calls were"
    if code != 0:
        return f"exit code {code}: {next((line for line in reversed(lines) if not line.startswith('===')), '')}"
    if tool != PLAIN and not counts:
        return f"checked nothing: {reports[0].removeprefix('========= ') if reports else 'no summary'}"
    return ""


def table(runs: Iterable[Run]) -> str:
    """A row for each room, with the seconds under each tool; FAILED where it was not clean, - where it did not run."""
    runs = list(runs)
    tools = dict.fromkeys(run.tool for run in runs)
    found = {(run.tool, run.room): run for run in runs}
    rows = [f"{'room':24s}" + "".join(f"{tool:>12s}" for tool in tools)]
    for room in dict.fromkeys(run.room for run in runs):
        cells = [found.get((tool, room)) for tool in tools]
        texts = ("-" if cell is None else "FAILED" if cell.reason else f"{cell.seconds:.1f} s" for cell in cells)
        rows.append(f"{room:24s}" + "".join(f"{text:>12s}" for text in texts))
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)}; all by default")
    parser.add_argument("--tools", default=",".join(TOOLS), help="of compute-sanitizer (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a room (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="folder for what the processes print (default: a temporary one)")
    options = parser.parse_args()
    if unknown := set(options.rooms) - set(ROOMS):
        parser.error(f"no room is called {', '.join(sorted(unknown))}; there are {', '.join(ROOMS)}")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    logs = options.logs or Path(tempfile.mkdtemp(prefix="sanitize-"))
    logs.mkdir(parents=True, exist_ok=True)
    settings, began = Settings(sanitizer, options.limit, logs), time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        plain = list(pool.map(lambda room: run(PLAIN, room, settings), options.rooms or ROOMS))
        checked = [(tool, one.room) for tool in options.tools.split(",") for one in plain if not one.reason]
        runs = [*plain, *pool.map(lambda one: run(*one, settings), checked)]
    failed = [one for one in runs if one.reason]
    print(f"\n{table(runs)}\n")
    for one in failed:
        print(f"FAILED {one.tool} {one.room}: {one.reason} ({one.log})")
    print(f"{len(runs) - len(failed)} of {len(runs)} runs clean in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
