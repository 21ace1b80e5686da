"""Benchmark cases of mla_decode: latents of 512 channels and 64 of the position, as in DeepSeek-V2 and V3."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.latent import FORMATS, LatentFormat, PackedLatent
from quantlab_kernels.mla_decode import op, reference

RANK, ROPE, SCALE = 512, 64, 192**-0.5
SHAPES = [
    *((heads, 16, 1024) for heads in (16, 64, 128)),
    *((heads, 16, 4096) for heads in (32, 40, 64, 96, 128)),
    *((heads, 1, 1024) for heads in (16, 64, 128)),
    (16, 128, 4096), (64, 16, 32768), (128, 128, 4096),
    *((heads, 1, 65536) for heads in (16, 64, 128)),
]  # fmt: skip
BENCHED: tuple[LatentFormat, ...] = ("16bit", "fp8", "int4")

Operands = tuple[Tensor, Tensor, PackedLatent, Tensor]


def build(format: LatentFormat, heads: int, batch: int, tokens: int, device: torch.device, seed: int) -> Operands:
    """Random codes (one sequence's, repeated: filling gigabytes takes longer than measuring)."""
    generator = torch.Generator(device).manual_seed(seed)
    cache = PackedLatent.empty(format, batch, tokens, RANK, ROPE, device=device)
    rows = torch.randn(1, tokens, cache.latent.shape[2], generator=generator, device=device)
    whole = (rows * 30).to(torch.int8).view(torch.uint8)
    eight = cache.latent.dtype in (torch.uint8, torch.int8)
    cache.latent.copy_(whole.view(cache.latent.dtype) if eight else rows)
    cache.rope.copy_(torch.randn(1, tokens, ROPE, generator=generator, device=device))
    if cache.scale is not None:
        cache.scale.fill_(0.02)
    q = torch.randn(batch, 1, heads, RANK + ROPE, generator=generator, device=device, dtype=torch.bfloat16)
    length = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    return q[..., :RANK], q[..., RANK:], cache, length


def _ours(q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor) -> Tensor:
    return op.mla_decode(q_latent, q_rope, cache, length, scale=SCALE)[0]


def _reference(q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor) -> Tensor:
    return reference.attend(q_latent, q_rope, cache, length, None, SCALE)[0]


def cases() -> list[Case]:
    found = []
    for heads, batch, tokens in SHAPES:
        for name in BENCHED:
            problem = op.Problem(batch, heads, 1, RANK, ROPE, tokens, FORMATS[name], sm=present_sm())
            found.append(
                Case(
                    f"{name} h{heads} {batch}x{tokens}", problem, functools.partial(build, name, heads, batch, tokens),
                    _ours, _reference, flops=problem.flops, bytes=problem.bytes, wide=True,
                )
            )  # fmt: skip
    return found
