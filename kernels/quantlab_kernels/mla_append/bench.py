"""Benchmark cases of mla_append: a decoding step of a batch, and a chunk of a prompt, in the shape of DeepSeek-V3."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.latent import FORMATS, LatentFormat, PackedLatent
from quantlab_kernels.mla_append import op

RANK, ROPE = 512, 64
SHAPES = [(1, 1), (128, 1), (8, 2048)]  # batch, tokens
BENCHED: tuple[LatentFormat, ...] = ("fp8", "int4")

Operands = tuple[Tensor, PackedLatent, Tensor, Tensor, Tensor, Tensor]


def _build(format: LatentFormat, batch: int, tokens: int, device: torch.device, seed: int) -> Operands:
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(batch, tokens, RANK + ROPE, generator=generator, device=device, dtype=torch.bfloat16)
    cache = PackedLatent.empty(format, batch, tokens + 64, RANK, ROPE, device=device)
    length = torch.full((batch,), tokens + 32, dtype=torch.int32, device=device)
    norm = torch.ones(RANK, dtype=torch.bfloat16, device=device)
    angles = torch.randn(1, tokens, ROPE, generator=generator, device=device)
    return rows, cache, length, norm, angles.cos(), angles.sin()


def _ours(rows: Tensor, cache: PackedLatent, length: Tensor, norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    latent, rope = rows.split([RANK, ROPE], -1)
    op.mla_append(latent, rope, cache, length, norm=norm, cos=cos, sin=sin, interleaved=True)


def _reference(rows: Tensor, cache: PackedLatent, length: Tensor, norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    empty = PackedLatent.empty(cache.format, rows.shape[0], cache.capacity, RANK, ROPE)
    _ours(rows.cpu(), empty, length.cpu(), norm.cpu(), cos.cpu(), sin.cpu())


def cases() -> list[Case]:
    found = []
    for batch, tokens in SHAPES:
        for name in BENCHED:
            problem = op.Problem(batch, tokens, RANK, ROPE, FORMATS[name], sm=present_sm(), more=True)
            found.append(
                Case(
                    f"{name} {batch}x{tokens}", problem, functools.partial(_build, name, batch, tokens), _ours,
                    _reference, flops=0, bytes=problem.bytes,
                )
            )  # fmt: skip
    return found
