"""Experts that a checkpoint holds fused in one 3-D tensor, seen as the matrices they are.

Formats store one quantized matrix per expert, `...experts.7.up_proj`. Rows of one expert lie together in the file, so
the matrices are views of the source; nothing is copied to take a tensor apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quantlab.checkpoint import WEIGHT
from quantlab.shards import TensorInfo

GATE_UP, DOWN = "gate_up_proj", "down_proj"


def matrices(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[tuple[str, TensorInfo], ...]:
    """(module, weight [N, K]) of each expert, from `gate_up_proj` [E, 2I, H] (gate first) or `down_proj` [E, H, I].

    Empty where the tensor is neither, or where it is stored transposed (Llama-4, GPT-OSS), which only the shapes of
    both tensors together tell.
    """
    experts, _, leaf = info.name.removesuffix(WEIGHT).rpartition(".")
    suffix = WEIGHT if info.name.endswith(WEIGHT) else ""
    gate_up, down = (tensors.get(f"{experts}.{name}{suffix}") for name in (GATE_UP, DOWN))
    if info not in (gate_up, down) or gate_up is None or down is None or len(info.shape) != 3:
        return ()
    count, double, hidden = gate_up.shape
    if down.shape != (count, hidden, double // 2) or double % 2:
        return ()
    parts = (
        [(0, double // 2, "gate_proj"), (double // 2, double, "up_proj")] if leaf == GATE_UP else [(0, hidden, DOWN)]
    )
    return tuple(
        (f"{experts}.{expert}.{name}", _rows(info, expert, begin, end))
        for expert in range(count)
        for begin, end, name in parts
    )


def _rows(info: TensorInfo, expert: int, begin: int, end: int) -> TensorInfo:
    """Rows [begin, end) of one expert."""
    row_bytes = info.nbytes // (info.shape[0] * info.shape[1])
    first = info.begin + (expert * info.shape[1] + begin) * row_bytes
    return replace(info, shape=(end - begin, info.shape[2]), begin=first, end=first + (end - begin) * row_bytes)


def probes(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the matrices that fused tensors would become. A loader that knows them takes experts one by one."""
    fused = [info for info in tensors.values() if len(info.shape) == 3]
    return [module + WEIGHT for info in fused for module, _ in matrices(info, tensors)]
