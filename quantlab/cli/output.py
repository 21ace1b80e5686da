"""What commands show: a progress line, tables, and JSON for machines. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.table import Table

STDERR = Console(stderr=True, highlight=False)
Progress = Callable[[str, int, int], None]


class Format(StrEnum):
    """Choices of --format."""

    human = "human"
    json = "json"


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; columns after the first are numbers and align right. Plain text when piped."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(highlight=False)
    Console(highlight=False, width=None if console.is_terminal else 160).print(table)


def size(n_bytes: float) -> str:
    """Bytes in decimal units, as disks and model hubs count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


@contextmanager
def progress(enabled: bool = True) -> Iterator[Progress | None]:
    """A progress callback (label, done, total): a bar with ETA on a terminal, else one line per label."""
    if not enabled:
        yield None
    elif STDERR.is_terminal:
        with _bar() as callback:
            yield callback
    else:
        yield _line_per_label()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    with RichProgress(*columns, console=STDERR, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def _line_per_label() -> Progress:
    start = time.monotonic()
    last = ""

    def report(label: str, done: int, total: int) -> None:
        nonlocal last
        if label == last:
            return
        last = label
        elapsed = time.monotonic() - start
        eta = f", {elapsed * (total - done) / done:.0f} s left" if 0 < done < total else ""
        share = f"{100 * done / total:3.0f} %" if total else ""
        print(f"{share} {label}{eta}", file=sys.stderr, flush=True)

    return report
