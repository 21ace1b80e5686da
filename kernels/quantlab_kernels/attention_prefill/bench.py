"""Benchmark cases of attention_prefill: one layer of 16 heads, from many short sequences to a long one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantlab_kernels.attention_prefill import op, peers, reference
from quantlab_kernels.attention_prefill.reference import Attributes
from quantlab_kernels.attention_quantize.op import Quantized, attention_quantize
from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm

# name -> (batch, query heads, key heads, tokens, head dimension)
SHAPES = {
    "16x1k": (16, 16, 16, 1024, 128),
    "4x4k": (4, 16, 16, 4096, 128),
    "1x16k": (1, 16, 16, 16384, 128),
    "1x32k": (1, 16, 16, 32768, 128),
    "llama3-8b 1x8k": (1, 32, 8, 8192, 128),
    "llama3-8b 1x32k": (1, 32, 8, 32768, 128),
    "d64 1x16k": (1, 32, 32, 16384, 64),
}


def _build(problem: op.Problem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Operands, ours and cuDNN's, and what they were made of."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, tokens: int) -> Tensor:
        shape = problem.batch, heads, tokens, problem.d
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v = (
        draw(problem.heads_q, problem.sq), draw(problem.heads_kv, problem.skv), draw(problem.heads_kv, problem.skv)
    )  # fmt: skip
    fp8 = attention_quantize(q, k, v, qk="fp8", pv="fp8")
    return attention_quantize(q, k, v), fp8, peers.fp8_operands(q, k, v), q, k, v


def _ours(causal: bool, int8: Quantized, *others: Any) -> Tensor:
    return op.attention_prefill(int8, causal=causal)[0]


def _fp8(causal: bool, int8: Quantized, fp8: Quantized, *others: Any) -> Tensor:
    return op.attention_prefill(fp8, causal=causal)[0]


def _whole(causal: bool, *inputs: Any) -> Tensor:
    q, k, v = inputs[3:]
    return op.attention_8bit(q, k, v, causal=causal)[0]


def _sdpa(backend: SDPBackend, causal: bool, *inputs: Any) -> Tensor:
    q, k, v = inputs[3:]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def _peer(call: Callable[..., Any] | str, first: int, last: int | None = None) -> Callable[..., Any] | str:
    """A peer that takes some of the inputs."""
    return call if isinstance(call, str) else lambda *inputs: call(*inputs[first:last])


def _reference(causal: bool, int8: Quantized, *others: Any) -> Tensor:
    low, high = reference.visible(int8.q.shape[2], int8.k.shape[2], -1, 0 if causal else -1)
    device = int8.q.device
    attributes = Attributes(int8.q.shape[3] ** -0.5)
    return reference.attend(int8, attributes, low.to(device), high.to(device), None, torch.float32)[0]


def _through(name: str, problem: op.Problem) -> Callable[..., Tensor]:
    """The kernel of one backend, without dispatch."""
    module = op.BACKENDS.module(name)
    attributes = Attributes(problem.d**-0.5, -1, 0 if problem.causal else -1)

    def call(int8: Quantized, *others: Any) -> Tensor:
        out = int8.q.new_empty((problem.batch, problem.sq, problem.heads_q, problem.d), dtype=problem.out_dtype)
        lse = int8.q_scale.new_empty((problem.batch, problem.heads_q, problem.sq))
        module.launch(problem, int8, attributes, None, None, None, None, out, lse)
        return out

    return call


def cases() -> list[Case]:
    found = [_case("1x64", (1, 1, 1, 64, 64), True)]  # for the dry run
    for name, shape in SHAPES.items():
        found += [_case(f"{name} causal", shape, True), _case(name, shape, False)]
    return found


def _case(name: str, shape: tuple[int, int, int, int, int], causal: bool) -> Case:
    batch, heads_q, heads_kv, tokens, d = shape
    problem = op.Problem(batch, heads_q, heads_kv, tokens, tokens, d, causal, sm=present_sm())
    able = [b for b in op.BACKENDS.names if b != "eager" and not op.BACKENDS.reason(b, problem, question="able")]
    on_gpu = able if torch.cuda.is_available() else []
    sdpa = {"SDPA cuDNN bf16": SDPBackend.CUDNN_ATTENTION, "SDPA flash bf16": SDPBackend.FLASH_ATTENTION}
    return Case(
        name, problem, functools.partial(_build, problem), functools.partial(_ours, causal),
        functools.partial(_reference, causal), problem.flops, batch * d * tokens * (3 * heads_q + 2 * heads_kv),
        backends={backend: _through(backend, problem) for backend in on_gpu},
        peers={
            "with its quantization": functools.partial(_whole, causal),
            "fp8": functools.partial(_fp8, causal),
            **{peer: functools.partial(_sdpa, backend, causal) for peer, backend in sdpa.items()},
            "cuDNN fp8": _peer(peers.cudnn_fp8(causal), 2, 3),
            "SageAttention, with its quantization": _peer(peers.sage(causal), 3),
        },
    )  # fmt: skip
