"""Benchmark cases of attention_decode: 32 query and 8 KV heads of 128 channels; peer: SDPA flash in bfloat16.

Keys have a mean and a scale per channel, as those of models do; formats that keep the first 4 tokens and the newest 64
in 16 bits there are timed with these too.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantlab_kernels.attention_decode import op, reference
from quantlab_kernels.attention_decode.reference import Attributes
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.kv import FORMATS, KVFormat, PackedKV

HEADS_Q, HEADS_KV, D = 32, 8, 128
# Sequences, and tokens of each.
SHAPES = [(1, 1024), (16, 1024), (4, 4096), (64, 4096), (128, 8192), (16, 32768), (1, 32768), (1, 131072)]
BENCHED: tuple[tuple[KVFormat, int, int], ...] = (  # with so many first and newest tokens in 16 bits
    ("fp8", 0, 0), ("fp8", 4, 64), ("int8", 0, 0), ("k8v4", 4, 64), ("int4", 0, 0), ("int4", 4, 64),
)  # fmt: skip


def _build(
    format: KVFormat, first: int, newest: int, batch: int, tokens: int, device: torch.device, seed: int
) -> tuple[Tensor, PackedKV, Tensor, Tensor, Tensor]:
    """Random codes (one sequence's, repeated: filling gigabytes takes longer than measuring) and a peer's operands."""
    generator = torch.Generator(device).manual_seed(seed)
    cache = PackedKV.empty(format, batch, HEADS_KV, tokens, D, device=device, first=first, newest=newest)
    for codes in (cache.k, cache.v):
        shape = (1, *codes.shape[1:3], D)
        rows = torch.randn(shape, generator=generator, device=device)
        whole = (rows * 30).to(torch.int8).view(torch.uint8)[..., : codes.shape[3]]
        codes.copy_((rows * 100).clamp(-448, 448) if codes.dtype == torch.float8_e4m3fn else whole.view(codes.dtype))
    for scale in (cache.k_scale, cache.v_scale):
        if scale is not None:
            scale.fill_(0.02)
    for near in (cache.k_near, cache.v_near):
        if near is not None:
            near.normal_(generator=generator)
    q = torch.randn(batch, HEADS_Q, 1, D, generator=generator, device=device, dtype=torch.bfloat16)
    length = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    rows = torch.randn(1, HEADS_KV, tokens, D, generator=generator, device=device, dtype=torch.bfloat16)
    k = rows.expand(batch, -1, -1, -1).contiguous()
    mean, channel = (torch.rand(1, HEADS_KV, D, generator=generator, device=device) + 0.5 for _ in range(2))
    return q, cache.with_keys(mean, channel), length, k, k.clone()


def _ours(q: Tensor, cache: PackedKV, length: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return op.attention_decode(q, cache, length)[0]


def _reference(q: Tensor, cache: PackedKV, length: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attend(q, cache, length, None, Attributes(D**-0.5), None)[0]


def _flash(q: Tensor, cache: PackedKV, length: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def cases() -> list[Case]:
    found = []
    for batch, tokens in SHAPES:
        for name, first, newest in BENCHED:
            near = first + newest
            problem = op.Problem(
                batch, HEADS_Q, HEADS_KV, 1, D, tokens, *FORMATS[name], near=near, sm=present_sm()
            )  # fmt: skip
            found.append(
                Case(
                    f"{name}{f' near {near}' if near else ''} {batch}x{tokens}", problem,
                    functools.partial(_build, name, first, newest, batch, tokens), _ours, _reference,
                    flops=problem.flops, bytes=problem.bytes, peers={"SDPA flash bf16": _flash}, wide=True,
                )
            )  # fmt: skip
    return found
