"""Grouped FP8 GEMM on the CPU: against the product of each expert, and the lookup of the Triton kernel interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quantlab_kernels import gemm_fp8_block, gemm_fp8_grouped, gemm_fp8_row
from quantlab_kernels.gemm_fp8_block.sm90_configs import SHARED_LIMIT
from quantlab_kernels.gemm_fp8_grouped import sm90
from quantlab_kernels.gemm_fp8_grouped.op import BACKENDS, GroupedProblem
from quantlab_kernels.quantize_fp8 import reference as quantizer


def operands(counts, n, k, *, blocked=True, spare=0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts) + spare, k, generator=generator)
    w = torch.randn(len(counts), n, k, generator=generator)
    a, a_scale = quantizer.group(x, None, False) if blocked else quantizer.token(x)
    parts = [quantizer.block(e, None, False) if blocked else quantizer.token(e) for e in w]
    b, b_scale = (torch.stack(column) for column in zip(*parts, strict=True))
    return a, a_scale, b, b_scale, torch.tensor(counts)


@pytest.mark.parametrize("blocked", [True, False])
def test_each_row_meets_the_weight_of_its_expert(blocked):
    counts = [3, 0, 5, 1]
    a, a_scale, b, b_scale, given = operands(counts, 160, 256, blocked=blocked, spare=2)
    out = gemm_fp8_grouped(a, a_scale, b, b_scale, given, out_dtype=torch.float32)
    one, start = (gemm_fp8_block if blocked else gemm_fp8_row), 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        expected = one(a[rows], a_scale[rows], b[expert], b_scale[expert], out_dtype=torch.float32)
        assert torch.equal(out[rows], expected)
        start += count


def test_what_does_not_fit_is_named():
    a, a_scale, b, b_scale, counts = operands([2, 2], 128, 128)
    for change, message in (
        ({"counts": counts.int()}, "counts are torch.int32"),
        ({"counts": counts[:1]}, r"needs int64 \(2,\)"),
        ({"b": b[0]}, "needs .S, K. and .E, N, K."),
        ({"a": a.float()}, "a is torch.float32"),
        ({"b_scale": b_scale[:1]}, "scales are"),
    ):
        given = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "counts": counts} | change
        with pytest.raises(RuntimeError, match=message):
            gemm_fp8_grouped(*given.values())


def test_thousands_of_rows_take_the_unrolled_loop():
    for problem, unroll in (
        (GroupedProblem(8 * 4096, 4096, 7168, 8), 1),
        (GroupedProblem(8 * 4096, 2048, 768, 8), 0),  # six blocks of K are no whole rings
        (GroupedProblem(8 * 4096, 4096, 7168, 8, blocked=False), 0),
        (GroupedProblem(8 * 512, 4096, 7168, 8), 0),
        (GroupedProblem(128 * 512, 1536, 2048, 128), 1),
    ):
        config = sm90.config(problem)
        assert (config.unroll, config.rotate) == (unroll, unroll)
        assert config.shared_bytes() <= SHARED_LIMIT


def test_traces_without_data():
    given = operands([2, 2], 128, 128)
    torch.library.opcheck(
        torch.ops.quantlab.gemm_fp8_grouped.default, (*given, torch.float32), test_utils="test_faketensor"
    )


def test_tiles_follow_the_rows_of_an_expert():
    def config(rows, **changes):
        return sm90.config(GroupedProblem(rows, 4096, 7168, 8, **changes))

    assert [config(rows).by for rows in (8, 8 * 12, 8 * 16, 8 * 50, 8 * 60)] == [16, 16, 32, 64, 64]
    assert all(config(rows).swap for rows in (1, 64, 512))
    assert not config(8 * 128).swap
    assert config(8 * 4096).bx == 192
    assert config(8 * 4096, out_dtype=torch.float32).output_tma == 0
    assert config(64, blocked=False) == replace(config(64), row=1)
    for reason, problem in (
        ("sm_90 only", GroupedProblem(8, 128, 128, 8, sm=80)),
        ("multiples of 128", GroupedProblem(8, 128, 192, 8)),
        ("512 experts at most", GroupedProblem(8, 128, 128, 600)),
    ):
        assert reason in BACKENDS.reason("sm90", problem)


INTERPRETED = """
import sys, torch
sys.path.insert(0, "tests/ops")
from test_gemm_fp8_grouped import operands
from quantlab_kernels.gemm_fp8_grouped import reference, triton as backend
backend.gpu_of = lambda tensor: type("G", (), {"sm": 80})()
for blocked in (True, False):
    for counts, spare in (([3, 0, 20, 1, 0], 0), ([0, 0, 7], 3), ([0], 2), ([40], 0)):
        a, a_scale, b, b_scale, given = operands(counts, 80, 256, blocked=blocked, spare=spare)
        out = torch.full((len(a), 80), 7.0)
        backend.launch(a, a_scale, b, b_scale, given, out, backend.Config(16, 64))
        exact = reference.gemm(a, a_scale, b, b_scale, given)
        total = sum(counts)
        assert (out[total:] == 7).all()
        assert torch.allclose(out[:total].double(), exact[:total], rtol=1e-3, atol=1e-3), (blocked, counts)
print("right")
"""


def test_triton_kernel_interpreted(interpreted: Callable[[str], str]):
    assert interpreted(INTERPRETED).strip() == "right"
