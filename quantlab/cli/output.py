"""What commands show: progress, tables, JSON for machines. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from quantlab.summary import Progress, Shown

STDERR = Console(stderr=True, highlight=False)
SCHEMA = 1  # of JSON documents; raised when a key changes its meaning or goes away


class Format(StrEnum):
    """Choices of --format."""

    human = "human"
    json = "json"


def print_json(data: Any) -> None:
    """One JSON document on stdout; README.md beside this file says what is in it."""
    data = {"schema": SCHEMA, **data} if isinstance(data, dict) else data
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(data, indent=2, ensure_ascii=plain, default=str))


def print_tables(result: Shown) -> None:
    """The tables of a result on stdout, a blank line after each."""
    for title, header, rows in result.tables():
        print_table(title, header, rows)
        print()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout, columns of numbers aligned right. Lines are not broken when piped."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(header))
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    for name, column in zip(header, columns, strict=True):
        numbers = all(re.match(r"[-+]?[\d.]+( ?[%kMGT]?B?x?)?$", str(value)) for value in column)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)
    console.print(title, style="bold", markup=False)
    console.print(table)


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

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=STDERR, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def _line_per_label() -> Progress:
    first: tuple[float, int] | None = None  # when the first report came, and how much was done by then
    last = ""

    def report(label: str, done: int, total: int) -> None:
        nonlocal first, last
        if first is None or done < first[1]:
            first = time.monotonic(), done
        if label == last:
            return
        last = label
        elapsed, gained = time.monotonic() - first[0], done - first[1]
        told = elapsed > 1 and gained > 0.01 * total and done < total  # before that the estimate is noise
        eta = f", {elapsed * (total - done) / gained:.0f} s left" if told else ""
        share = f"{100 * done / total:3.0f} %" if total else ""
        print(f"{share} {label}{eta}", file=sys.stderr, flush=True)

    return report
