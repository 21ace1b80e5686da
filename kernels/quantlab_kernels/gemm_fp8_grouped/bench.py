"""Benchmark cases of gemm_fp8_grouped: the experts of DeepSeek-V3 on one of many GPUs, and Qwen3-30B-A3B's on one."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from quantlab_kernels.common.cases import Case
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.gemm_fp8_grouped import op, reference
from quantlab_kernels.gemm_fp8_grouped.op import GroupedProblem
from quantlab_kernels.quantize_fp8 import op as quantizer

# model -> (N, K) of its layers; (experts on the GPU, rows of each)
LAYERS = {
    "deepseek-v3": {"gate_up": (4096, 7168), "down": (7168, 2048)},
    "qwen3-30b": {"gate_up": (1536, 2048), "down": (2048, 768)},
    "granite-1b": {"gate_up": (1024, 1024), "down": (1024, 512)},
}
GROUPS = {
    "deepseek-v3": ((8, 8), (8, 16), (8, 32), (8, 64), (8, 128), (8, 512), (8, 4096)),
    "qwen3-30b": ((128, 1), (128, 8), (128, 512)),
    "granite-1b": ((32, 1),),
}


def _build(problem: GroupedProblem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Quantized operands with even counts; for the peers the same in bfloat16, and padded to 128 rows of an expert."""
    generator = torch.Generator(device).manual_seed(seed)
    options: Any = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    x = torch.randn(problem.rows, problem.k, **options)
    w = torch.randn(problem.experts * problem.n, problem.k, **options)
    a, a_scale = quantizer.quantize_fp8_group(x)
    b, b_scale = quantizer.quantize_fp8_block(w)
    counts = torch.full((problem.experts,), problem.rows // problem.experts, device=device)
    shape = problem.experts, problem.n
    return (
        a, a_scale, b.view(*shape, -1), b_scale.view(shape[0], -1, b_scale.shape[1]), counts, x, w.view(*shape, -1),
        _padded(problem, a, a_scale),
    )  # fmt: skip


def _padded(problem: GroupedProblem, a: Tensor, a_scale: Tensor) -> tuple[Tensor, ...]:
    """Codes [E, 128, K] and scales [E, 128, G], a column of which is contiguous."""
    each, pad = int(problem.mean), (0, 0, 0, max(0, 128 - int(problem.mean)))
    codes = torch.nn.functional.pad(a.view(torch.uint8).view(problem.experts, each, -1), pad).view(a.dtype)
    scale = torch.nn.functional.pad(a_scale.reshape(problem.experts, each, -1), pad)
    return codes, scale.transpose(1, 2).contiguous().transpose(1, 2)


def _ours(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
    return op.gemm_fp8_grouped(a, a_scale, b, b_scale, counts)


def _through(backend: str, problem: GroupedProblem) -> Any:
    """The op by one backend, without dispatch."""
    module = op.BACKENDS.module(backend)

    def call(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
        out = a.new_empty((problem.rows, problem.n), dtype=problem.out_dtype)
        module.launch(a, a_scale, b, b_scale, counts, out, module.config(problem))
        return out

    return call


def _deep_gemm(problem: GroupedProblem) -> Any:
    """Its masked form for few rows; its contiguous form, which wants multiples of 128, otherwise."""
    if importlib.util.find_spec("deep_gemm") is None:
        return "deep_gemm is not installed"
    import deep_gemm

    each = int(problem.mean)

    def masked(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
        out = a.new_empty((problem.experts, 128, problem.n), dtype=torch.bfloat16)
        deep_gemm.fp8_m_grouped_gemm_nt_masked(others[2], (b, b_scale), out, counts.int(), each)
        return out

    def contiguous(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
        rows = torch.arange(problem.experts, device=a.device, dtype=torch.int32).repeat_interleave(each)
        out = a.new_empty((problem.rows, problem.n), dtype=torch.bfloat16)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), out, rows)
        return out

    return masked if each < 128 else contiguous


def _bf16(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
    x, w, _ = others
    return torch._grouped_mm(x, w.transpose(1, 2), offs=counts.cumsum(0).int())


def _reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
    return reference.gemm(a, a_scale, b, b_scale, counts)


def cases() -> list[Case]:
    sm = present_sm()
    return [
        _case(f"{experts}x{rows} {model}.{layer}", GroupedProblem(experts * rows, n, k, experts, sm=sm))
        for model, layers in LAYERS.items()
        for experts, rows in GROUPS[model]
        for layer, (n, k) in layers.items()
    ]


def _case(name: str, problem: GroupedProblem) -> Case:
    able = [b for b in op.BACKENDS.names if b != "eager" and not op.BACKENDS.reason(b, problem)]
    weights = problem.experts * problem.n * problem.k
    traffic = weights + problem.rows * (problem.k + 2 * problem.n) + 4 * (problem.rows * problem.k // 128)
    return Case(
        name, problem, functools.partial(_build, problem), _ours, _reference, problem.flops, traffic,
        backends={b: _through(b, problem) for b in able} if torch.cuda.is_available() else {},
        peers={"bf16 grouped_mm": _bf16, "DeepGEMM": _deep_gemm(problem)},
    )  # fmt: skip
