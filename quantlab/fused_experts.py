"""Experts that a checkpoint holds fused in one 3-D tensor, seen as the matrices they are.

Most formats store one quantized matrix per expert, `...experts.7.up_proj`. Rows of one expert lie together in the file,
so the matrices are views of the source; where they lie by columns they are turned when they are read. Where readers
know an architecture's experts in one tensor only, they stay a `Stack`: codes as the weights lie, and beside them
`<name>_scale_inv`, as published FP8 checkpoints have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantlab.checkpoint import WEIGHT
from quantlab.shards import TensorInfo, TurnedInfo

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class Stack:
    """A tensor [E, N, K], or [E, K, N] if `transposed`, that is quantized as a whole.

    parts  (module, weight [N, K]) of each expert's matrices; for their shapes alone, only rows of a tensor that is not
           transposed lie together
    """

    info: TensorInfo
    transposed: bool
    parts: tuple[tuple[str, TensorInfo], ...]

    def modules(self, expert: int) -> tuple[str, ...]:
        """Names of the matrices of one expert, in the order of their rows."""
        count = len(self.parts) // self.info.shape[0]
        return tuple(module for module, _ in self.parts[expert * count : (expert + 1) * count])


def stack(info: TensorInfo, wanted: tuple[int, ...]) -> Stack | None:
    """A fused tensor seen as one, `wanted` the shape [E, N, K] of the parameter that it becomes.

    None where its shape is neither that nor its transpose, or both: readers would not agree which it is.
    """
    home, _, leaf = info.name.rpartition(".")
    experts, rows, columns = wanted
    if leaf not in (GATE_UP, DOWN) or rows == columns or info.shape not in (wanted, (experts, columns, rows)):
        return None
    names = ("gate_proj", "up_proj") if leaf == GATE_UP else (DOWN,)
    part = replace(info, shape=(rows // len(names), columns))
    parts = tuple((f"{home}.{expert}.{name}", part) for expert in range(experts) for name in names)
    return Stack(info, info.shape != wanted, parts)


def flat(info: TensorInfo) -> TensorInfo:
    """A 3-D tensor as a matrix of all its rows: blocks of 128 rows do not cross experts where each fills whole ones."""
    return replace(info, shape=(info.shape[0] * info.shape[1], info.shape[2])) if len(info.shape) == 3 else info


def matrices(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[tuple[str, TensorInfo], ...]:
    """(module, weight [N, K]) of each expert, from `gate_up_proj` [E, 2I, H] (gate first) or `down_proj` [E, H, I], or
    from both turned: [E, H, 2I], [E, I, H]. The shapes of both together tell which it is.

    Empty where the tensor is neither.
    """
    experts, _, leaf = info.name.removesuffix(WEIGHT).rpartition(".")
    suffix = WEIGHT if info.name.endswith(WEIGHT) else ""
    gate_up, down = (tensors.get(f"{experts}.{name}{suffix}") for name in (GATE_UP, DOWN))
    if info not in (gate_up, down) or gate_up is None or down is None or {len(gate_up.shape), len(down.shape)} != {3}:
        return ()
    count, rows, columns = gate_up.shape
    turned = down.shape == (count, columns // 2, rows)
    double, hidden = (columns, rows) if turned else (rows, columns)
    if double % 2 or not (turned or down.shape == (count, hidden, double // 2)):
        return ()
    parts = (
        [(0, double // 2, "gate_proj"), (double // 2, double, "up_proj")] if leaf == GATE_UP else [(0, hidden, DOWN)]
    )
    return tuple(
        (f"{experts}.{expert}.{name}", (_columns if turned else _rows)(info, expert, begin, end))
        for expert in range(count)
        for begin, end, name in parts
    )


def _rows(info: TensorInfo, expert: int, begin: int, end: int) -> TensorInfo:
    """Rows [begin, end) of one expert."""
    row_bytes = info.nbytes // (info.shape[0] * info.shape[1])
    first = info.begin + (expert * info.shape[1] + begin) * row_bytes
    return replace(info, shape=(end - begin, info.shape[2]), begin=first, end=first + (end - begin) * row_bytes)


def _columns(info: TensorInfo, expert: int, begin: int, end: int) -> TurnedInfo:
    """Columns [begin, end) of one expert, as the rows of a matrix."""
    _, rows, width = info.shape
    nbytes = info.nbytes // info.shape[0]
    first = info.begin + expert * nbytes
    return TurnedInfo(info.name, info.dtype, (end - begin, rows), info.shard, first, first + nbytes, begin, width)


def probes(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the matrices that fused tensors would become. A loader that knows them takes experts one by one."""
    fused = [info for info in tensors.values() if len(info.shape) == 3]
    return [module + WEIGHT for info in fused for module, _ in matrices(info, tensors)]
