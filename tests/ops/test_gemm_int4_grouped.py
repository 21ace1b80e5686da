"""Grouped INT4 GEMM on the CPU: against the product of each expert, and the lookup of the Triton kernel interpreted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantlab_kernels import (
    gemm_int4,
    gemm_int4_fp8,
    gemm_int4_grouped,
    quantize_fp8_group,
    quantize_fp8_token,
    repack_int4,
    warmup,
)
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.int4 import Int4Problem
from quantlab_kernels.gemm_int4_fp8.sm90_configs import reject
from quantlab_kernels.gemm_int4_grouped import sm90
from quantlab_kernels.gemm_int4_grouped.op import BACKENDS
from quantlab_kernels.packing import pack_int4

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
QUANTIZERS = {"group": quantize_fp8_group, "token": quantize_fp8_token, "none": lambda x: (x.to(torch.float16), None)}


def operands(counts, n, k, activations="group", *, spare=0):
    """Activations, their scales, words, scales of the weight, counts."""
    generator = torch.Generator().manual_seed(0)
    experts = len(counts)
    a, a_scale = QUANTIZERS[activations](torch.randn(sum(counts) + spare, k, generator=generator))
    codes = torch.randint(-7, 8, (experts * n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(experts * n, k // 128, generator=generator) + 0.5
    b_scale = as_group_scale(scale.to(BF16)).unflatten(0, (experts, n))
    return a, a_scale, pack_int4(codes).unflatten(0, (experts, n)), b_scale, torch.tensor(counts)


def tiles_of(words, bits):
    return repack_int4(words.flatten(0, 1), activation_bits=bits).unflatten(0, (len(words), -1))


@pytest.mark.parametrize("activations", QUANTIZERS)
@pytest.mark.parametrize("tiled", [False, True])
def test_each_row_meets_the_weight_of_its_expert(activations, tiled):
    counts = [3, 0, 5, 1]
    a, a_scale, words, b_scale, given = operands(counts, 128, 256, activations, spare=2)
    b = tiles_of(words, 8 if a.dtype == E4M3 else 16) if tiled else words
    dtype = torch.float16 if a_scale is None else torch.float32
    out, start = gemm_int4_grouped(a, a_scale, b, b_scale, given, out_dtype=dtype), 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        if a_scale is None:
            expected = gemm_int4(a[rows], words[expert], b_scale[expert])
        else:
            expected = gemm_int4_fp8(a[rows], a_scale[rows], words[expert], b_scale[expert], out_dtype=dtype)
        assert torch.equal(out[rows], expected)
        start += count


def test_what_does_not_fit_is_named():
    names = "a", "a_scale", "b", "b_scale", "counts"
    operation = dict(zip(names, operands([2, 2], 128, 256), strict=True))
    words, scale = operation["b"], operation["a_scale"]
    for change, message in (
        ({"counts": operation["counts"].int()}, "counts are torch.int32"),
        ({"counts": operation["counts"][:1]}, r"needs int64 \(2,\)"),
        ({"b": words[0]}, r"needs int32 words \(2, 128, 32\) or tiles \(2, 2, 2, 1024\)"),
        ({"b": tiles_of(words, 16)}, r"b is torch.int32 \(2, 2, 2, 2, 512\)"),
        ({"a": operation["a"].float()}, "a is torch.float32 beside an a_scale"),
        ({"a_scale": None}, "a is torch.float8_e4m3fn without a_scale"),
        ({"a_scale": scale[:3]}, r"a_scale is torch.float32 \(3, 2\)"),
        ({"b_scale": operation["b_scale"][:, :, :1]}, r"needs floats \[E, N, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            gemm_int4_grouped(*(operation | change).values())


def test_traces_without_data():
    given = operands([2, 2], 128, 128)
    torch.library.opcheck(
        torch.ops.quantlab.gemm_int4_grouped.default, (*given, torch.float32), test_utils="test_faketensor"
    )


def problem(rows, experts=8, **changes):
    return Int4Problem(rows, 4096, 7168, experts=experts, **changes)


def test_tiles_follow_the_rows_of_an_expert():
    assert [sm90.config(problem(8 * mean)).by for mean in (1, 12, 16, 32, 50, 64, 100)] == [16, 16, 32, 32, 64, 64, 128]
    for dtype in (E4M3, BF16, torch.float16):
        for mean in (1, 20, 60, 500):
            for out in (BF16, torch.float32):
                posed = problem(8 * mean, x=dtype, out_dtype=out, grouped=dtype == E4M3)
                assert reject(sm90.config(posed), posed) is None
    for reason, posed in (
        ("sm_90 only", problem(8, sm=80)),
        ("in words", problem(8, tiles=False)),
        ("512 experts at most", problem(8, experts=600)),
    ):
        assert reason in BACKENDS.reason("sm90", posed)


def test_warmup_compiles_each_kernel_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(sm90, "supports", lambda problem: None)
    monkeypatch.setattr(sm90.sm90.nvrtc, "cubin", compiled.append)
    assert sm90.warmup(problem(rows) for rows in (1, 8, 16)) == len(compiled) == 1
    assert compiled[0].macros["EXPERTS"] == 1


def test_warmup_names_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="experts are compiled ahead for INT4 weights only"):
        warmup([(128, 128)], experts=8)
    wanted = []
    monkeypatch.setattr(sm90, "warmup", wanted.extend)
    warmup([(128, 256)], tokens=(1, 4), int4=E4M3, experts=8, choices=2)
    assert [(p.m, p.n, p.k, p.experts, p.grouped) for p in wanted] == [(2, 128, 256, 8, True), (8, 128, 256, 8, True)]


INTERPRETED = """
import sys, torch
sys.path.insert(0, "tests/ops")
from test_gemm_int4_grouped import QUANTIZERS, operands
from quantlab_kernels.gemm_int4_grouped import reference, triton as backend
backend.gpu_of = lambda tensor: type("G", (), {"sm": 80})()
for activations in QUANTIZERS:
    for counts, spare in (([3, 0, 20, 1, 0], 0), ([0, 0, 7], 3), ([0], 2), ([40], 0)):
        given = operands(counts, 72, 256, activations, spare=spare)
        out = torch.full((len(given[0]), 72), 7.0)
        backend.launch(given[0], given[1], *given[2:], out, backend.Config(16, 64))
        exact = reference.gemm(*given)
        total = sum(counts)
        assert (out[total:] == 7).all()
        assert torch.allclose(out[:total].double(), exact[:total], rtol=1e-3, atol=1e-3), (activations, counts)
print("right")
"""


def test_triton_kernel_interpreted(interpreted: Callable[[str], str]):
    assert interpreted(INTERPRETED).strip() == "right"
