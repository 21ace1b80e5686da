"""What a run did: the numbers that are shown at its end and kept in the output."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
Progress = Callable[[str, int, int], None]  # called meanwhile with a label, how much is done and how much there is


class Shown:
    """A result that is shown as its tables: by commands, and by notebooks, which look for `_repr_html_`."""

    def tables(self) -> list[Table]:
        """(title, header, rows) for people."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return "".join(map(_html, self.tables()))


def _html(table: Table) -> str:
    title, header, rows = table

    def line(cells: Iterable[Any], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    head = line(header, "th") if any(header) else ""
    return f"<table><caption>{escape(title)}</caption>{head}{''.join(line(row, 'td') for row in rows)}</table>"


def size(n_bytes: float) -> str:
    """Bytes in decimal units, as disks and model hubs count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def sizes(before: int, after: int) -> str:
    """Both sizes and their ratio, for people."""
    ratio = before / max(after, 1)
    return f"{size(before)} -> {size(after)} ({f'{ratio:.2f}x smaller' if ratio > 1 else f'{1 / ratio:.2f}x as large'})"


@dataclass(frozen=True)
class Summary(Shown):
    """Result of quantize and convert.

    bytes_before, bytes_after  of all weights
    groups                     what happened -> (tensors, bytes in the source)
    tensor_parallel            largest size that every engine loads, None where it was not computed
    seconds                    wall time of the whole run
    stages                     read, quantize, write: seconds summed over the workers
    resumed                    shards that an interrupted run had finished
    peak_bytes                 largest memory of the process so far: "host", and "gpu" where torch took some
    calibration                what calibration and the measuring of keys found, as texts by name
    """

    output: str
    scheme: str
    bytes_before: int
    bytes_after: int
    groups: dict[str, tuple[int, int]]
    tensor_parallel: int | None
    seconds: float
    stages: dict[str, float]
    device: str
    resumed: int = 0
    peak_bytes: dict[str, int] = field(default_factory=lambda: peak_bytes())
    warnings: tuple[str, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def compression(self) -> float:
        return self.bytes_before / max(self.bytes_after, 1)

    def shares(self) -> dict[str, float]:
        """Part of the workers' time that each stage took."""
        total = sum(self.stages.values()) or 1.0
        return {stage: seconds / total for stage, seconds in self.stages.items()}

    def to_dict(self) -> dict[str, Any]:
        groups = {what: {"tensors": n, "bytes": size} for what, (n, size) in self.groups.items()}
        shares = {stage: round(share, 3) for stage, share in self.shares().items()}
        return asdict(self) | {"groups": groups, "compression": round(self.compression, 3), "shares": shares}

    def tables(self) -> list[Table]:
        groups = [(what, n, size(nbytes)) for what, (n, nbytes) in self.groups.items()]
        rate = self.bytes_before / max(self.seconds, 1e-9)
        facts: list[tuple[Any, ...]] = [
            ("weights", sizes(self.bytes_before, self.bytes_after)),
            ("time", f"{self.seconds:.1f} s on {self.device}, {size(rate)}/s"),
            ("of that", ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in self.shares().items())),
        ]
        facts.append(("peak memory", ", ".join(f"{where} {size(n)}" for where, n in self.peak_bytes.items())))
        if self.tensor_parallel is not None:
            facts.append(("largest tensor-parallel size", self.tensor_parallel))
        if self.resumed:
            facts.append(("continued", f"{self.resumed} shards were finished by an earlier run"))
        facts += [(f"calibration: {key}", value) for key, value in self.calibration.items()]
        facts += [("warning", text) for text in self.warnings]
        return [("what happened to the tensors", ("what", "tensors", "bytes"), groups), (self.output, ("", ""), facts)]


def peak_bytes() -> dict[str, int]:
    """Largest resident memory of this process, and the most that torch has held on a GPU."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak
