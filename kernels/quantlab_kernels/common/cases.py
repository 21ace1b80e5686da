"""What a room tells the benchmark harness: its cases, and the variants that are timed on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.hardware import Rates, present_sm

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One line of a benchmark.

    name       of the line; shapes are named after the models they come from
    problem    what backends are asked about
    build      (device, seed) -> one set of inputs
    ours       inputs -> result: the op as users call it
    reference  inputs -> result: the definition; called once in a dry run
    backends   name -> the same through one backend; those that are not able are left out
    peers      name -> the same by other means, or a text that says why there is none here
    flops      of dense matrix work, 0 for a pure stream
    bytes      least traffic
    wide       the matrix work is in 16 bits, which has its own roof
    """

    name: str
    problem: Any
    build: Callable[[torch.device, int], Inputs]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    flops: int
    bytes: int
    backends: dict[str, Callable[..., Any]] = field(default_factory=dict)
    peers: dict[str, Callable[..., Any] | str] = field(default_factory=dict)
    wide: bool = False

    def roofline_us(self, rates: Rates) -> float:
        """Time that no kernel beats: of the memory or of the matrix unit, whichever is longer."""
        rate = rates.bf16 if self.wide else rates.fp8
        matrix = self.flops / rate if rate else 0.0
        return max(self.bytes / rates.hbm, matrix) * 1e6


# (N, K) of linear layers, by model; gate and up, and q, k and v, as one.
WEIGHTS = {
    "llama3-8b.qkv": (6144, 4096),
    "llama3-8b.o": (4096, 4096),
    "llama3-8b.gate_up": (28672, 4096),
    "llama3-8b.down": (4096, 14336),
    "deepseek-v3.q_b": (24576, 1536),
    "deepseek-v3.gate_up": (4096, 7168),
    "deepseek-v3.o": (7168, 16384),
    "deepseek-v3.kv_a": (576, 7168),
    "llama3.2-1b.o": (2048, 2048),
}
TOKENS = (1, 16, 64, 256, 4096)


def bf16_peer(a: Tensor, b: Tensor) -> Tensor:
    """cuBLAS in bfloat16 on operands of the same shape."""
    return a @ b.t()


def gemm_problems(tokens: tuple[int, ...] = TOKENS) -> dict[str, GemmProblem]:
    """Every weight shape with every number of tokens: "llama3-8b.qkv M=16"."""
    return {f"{name} M={m}": GemmProblem(m, n, k, sm=present_sm()) for name, (n, k) in WEIGHTS.items() for m in tokens}
