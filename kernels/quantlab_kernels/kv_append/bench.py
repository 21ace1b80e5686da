"""Benchmark cases of kv_append: 8 KV heads of 128 channels, a decoding step of a batch and a chunk of a prompt."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.kv import FORMATS, KVFormat, PackedKV
from quantlab_kernels.kv_append import op

HEADS, D = 8, 128
SHAPES = [(1, 1), (32, 1), (128, 1), (1, 2048), (8, 2048)]  # batch, tokens
BENCHED: tuple[KVFormat, ...] = ("fp8", "int8", "int4")


def _build(
    format: KVFormat, batch: int, tokens: int, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, PackedKV, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, tokens, HEADS, D)
    k = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)
    v = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)
    cache = PackedKV.empty(format, batch, HEADS, tokens + 64, D, device=device)
    ones = torch.ones(1, HEADS, D, device=device)
    length = torch.full((batch,), tokens + 32, dtype=torch.int32, device=device)
    return k, v, cache.with_keys(ones, ones), length


def _ours(k: Tensor, v: Tensor, cache: PackedKV, length: Tensor) -> None:
    op.kv_append(k, v, cache, length)


def _reference(k: Tensor, v: Tensor, cache: PackedKV, length: Tensor) -> None:
    op.kv_append(k.cpu(), v.cpu(), PackedKV.empty(cache.format, k.shape[0], HEADS, cache.capacity, D), length.cpu())


def cases() -> list[Case]:
    found = []
    for batch, tokens in SHAPES:
        for name in BENCHED:
            problem = op.Problem(batch, HEADS, tokens, D, *FORMATS[name], sm=present_sm())
            found.append(
                Case(
                    f"{name} {batch}x{tokens}", problem, functools.partial(_build, name, batch, tokens), _ours,
                    _reference, flops=0, bytes=problem.bytes,
                )
            )  # fmt: skip
    return found
