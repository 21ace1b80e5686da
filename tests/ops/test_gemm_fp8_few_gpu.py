"""The Hopper kernel for few tokens on the GPU: every kind of configuration, ragged shapes, launches that overlap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantlab_kernels.common import nvrtc
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.operands import operand
from quantlab_kernels.gemm_fp8_block import reference, sm90_few
from quantlab_kernels.gemm_fp8_row import reference as row_reference
from quantlab_kernels.quantize_fp8 import reference as quantizer

pytestmark = pytest.mark.gpu(sm=90)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(1, 384, 1024), (8, 200, 128), (13, 1217, 1152), (16, 72, 7168), (5, 2048, 896)]


def operands(m: int, n: int, k: int, row: int = 0):
    x, w = (operand("rows" if row else "normal", rows, k, seed=rows, device="cuda") for rows in (m, n))
    if row:
        return *quantizer.token(x), *quantizer.token(w)
    return *quantizer.group(x, None, False), *quantizer.block(w, None, True)


def run(config, a, a_scale, b, b_scale, bias=None, dtype=BF16, out=None):
    if out is None:
        out = torch.full((a.shape[0], b.shape[0]), torch.nan, dtype=dtype, device="cuda")
    sm90_few.launch(a, a_scale, b, b_scale, bias, out, config)
    return out


def check(out, a, a_scale, b, b_scale, bias=None, row: int = 0):
    gemm = row_reference.gemm if row else reference.gemm
    a_abs, b_abs = (t.float().abs().to(t.dtype) for t in (a, b))
    exact = gemm(a, a_scale, b, b_scale, bias)
    magnitude = gemm(a_abs, a_scale, b_abs, b_scale, None if bias is None else bias.abs())
    found = worst(out, exact, gemm_bound(exact, magnitude, a.shape[1], out.dtype, "fp8"))
    assert found.ratio <= 1, found


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_every_candidate_is_inside_the_bound_and_repeats_itself(m, n, k, row):
    given = operands(m, n, k, row)
    tried = [replace(config, row=row) for config in sm90_few.candidates(GemmProblem(m, n, k))]
    nvrtc.compile_all([sm90_few.source(config, BF16, None) for config in tried], workers=8)
    for config in tried:
        out = run(config, *given)
        check(out, *given, row=row)
        assert torch.equal(out, run(config, *given)), config


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_outputs_and_biases(dtype):
    for m, row in ((3, 0), (16, 1)):
        given = operands(m, 520, 512, row)
        for bias_dtype in (None, BF16, FP16, FP32):
            bias = None if bias_dtype is None else torch.linspace(-2, 2, 520, device="cuda").to(bias_dtype)
            config = replace(sm90_few.config(GemmProblem(m, 520, 512)), row=row)
            check(run(config, *given, bias, dtype), *given, bias, row)


def test_strided_rows_and_a_misaligned_operand():
    a, a_scale, b, b_scale = operands(11, 512, 1024)
    wide = torch.zeros(11, 1040, dtype=torch.uint8, device="cuda").view(a.dtype)
    wide[:, :1024] = a
    out = torch.full((11, 1024), torch.nan, dtype=BF16, device="cuda")
    config = sm90_few.config(GemmProblem(11, 512, 1024))
    run(config, wide[:, :1024], a_scale, b, b_scale, out=out[:, 1:513])
    check(out[:, 1:513], a, a_scale, b, b_scale)
    assert out[:, 0].isnan().all()
    assert out[:, 513:].isnan().all()
    shifted = torch.zeros(a.numel() + 1, dtype=torch.uint8, device="cuda").view(a.dtype)[1:].view(a.shape).copy_(a)
    check(run(config, shifted, a_scale, b, b_scale), a, a_scale, b, b_scale)


@pytest.mark.parametrize("m", [2, 16])
def test_a_nan_stays_in_its_row(m):
    a, a_scale, b, b_scale = operands(m, 512, 1024)
    a_scale[1, 3] = torch.nan
    out = run(sm90_few.config(GemmProblem(m, 512, 1024)), a, a_scale, b, b_scale)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()
    assert not out[2:].isnan().any()


@pytest.mark.parametrize("m", [1, 8, 16])
def test_a_chain_of_launches_in_a_graph(m):
    """Replays give what launches one by one do."""
    k = 1024
    _, _, b, b_scale = operands(m, k, k)
    x = operand("normal", m, k, seed=3, device="cuda").to(BF16)
    start, scale = quantizer.group(x, None, False)
    config = sm90_few.config(GemmProblem(m, k, k))

    def chain() -> torch.Tensor:
        codes = start
        for _ in range(12):
            out = run(config, codes, scale, b, b_scale)
            codes = (out / out.float().square().mean().sqrt()).to(codes.dtype)
        return out

    expected = chain()
    exact = start
    for _ in range(12):
        out = reference.gemm(exact, scale, b, b_scale, None)
        exact = (out.to(BF16) / out.float().square().mean().sqrt()).to(exact.dtype)
    assert float((expected.double() - out).norm() / out.norm()) < 0.2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(50):
        result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(("m", "row"), [(1, 0), (8, 1), (16, 0)])
def test_tokens_that_are_written_late(m, row, waits, late_results, without_wait, monkeypatch):
    """The kernel starts before its tokens are there. One that does not wait for them shows that this can fail."""
    k = 1024
    a, a_scale, b, b_scale = operands(m, k, k, row)
    config = replace(sm90_few.config(GemmProblem(m, k, k)), row=row)
    expected = run(config, a, a_scale, b, b_scale)  # the weights are known from here on
    check(expected, a, a_scale, b, b_scale, row=row)

    if not waits:
        monkeypatch.setattr(sm90_few, "_kernel", without_wait(sm90_few.source, "gemm_fp8_few"))
    run(config, a, a_scale, b, b_scale)  # its code is loaded
    found = late_results(lambda late, out: run(config, late, a_scale, b, b_scale, out=out), a, expected)
    assert all(found) if waits else not all(found)
