"""Tuned configurations: tables of JSON beside the kernels, written by a sweep and reviewed like code.

``<room>/tuned/NVIDIA_H200.json``::

    {"about": {"gpu": ..., "torch": ..., "triton": ..., "commit": ..., "date": ...},
     "triton": {"N=4096,K=7168": {"64": {"block_m": 16, ...}, "256": {...}}}}

First key: the backend (a room may use a variant's name instead); then the weight's shape, then M. A shape that is not
in the table has no entry and the caller takes its heuristic; M is matched to the nearest in log space, since what
matters doubles with M.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

from quantlab_kernels.common.hardware import gpu

Config = dict[str, Any]
_PACKAGE = Path(__file__).parent.parent


def lookup(room: str, backend: str, *, n: int, k: int, m: int) -> Config | None:
    """Tuned configuration for this GPU, or None when there is no GPU, no table or no such shape."""
    if not torch.cuda.is_available():
        return None
    return nearest(table(room, gpu(torch.cuda.current_device()).slug).get(backend, {}), n, k, m)


@functools.cache
def table(room: str, gpu_slug: str) -> dict[str, Any]:
    """The whole table of a room for one GPU; empty when nothing was tuned there."""
    path = table_path(room, gpu_slug)
    return json.loads(path.read_text()) if path.is_file() else {}


def table_path(room: str, gpu_slug: str) -> Path:
    return _PACKAGE / room / "tuned" / f"{gpu_slug}.json"


def nearest(entries: dict[str, dict[str, Config]], n: int, k: int, m: int) -> Config | None:
    """The entry of this weight shape whose M is nearest to `m` in log space; of two equally near, the larger M."""
    by_m = entries.get(f"N={n},K={k}")
    if not by_m:
        return None
    return by_m[min(by_m, key=lambda bucket: (abs(math.log(int(bucket)) - math.log(max(m, 1))), -int(bucket)))]


def save(room: str, gpu_slug: str, about: dict[str, Any], backend: str, entries: dict[str, dict[str, Config]]) -> Path:
    """Merge tuned entries into the room's table and write it, sorted, for review."""
    path = table_path(room, gpu_slug)
    content = json.loads(path.read_text()) if path.is_file() else {}
    merged = content.get(backend, {})
    for shape, by_m in entries.items():
        merged[shape] = dict(sorted({**merged.get(shape, {}), **by_m}.items(), key=lambda item: int(item[0])))
    content = {**content, "about": about, backend: dict(sorted(merged.items()))}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    table.cache_clear()
    return path
