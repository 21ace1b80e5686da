"""Grouped FP8 GEMM on a GPU: every backend inside the bound, whatever the counts; nothing read or written beside."""

from __future__ import annotations

import pytest
import torch

from quantlab_kernels import gemm_fp8_grouped
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.gemm_fp8_block import sm90_configs
from quantlab_kernels.gemm_fp8_grouped import reference, sm90
from quantlab_kernels.gemm_fp8_grouped.op import BACKENDS, problem_of
from quantlab_kernels.quantize_fp8 import reference as quantizer

pytestmark = pytest.mark.gpu(sm=80)

COUNTS = {
    "few": [3, 0, 16, 1, 0, 7],
    "none": [0, 0, 0],
    "one of all": [0, 0, 40, 0],
    "ragged": [129, 0, 64, 63, 65, 1, 200, 128],
    "tall": [1500, 0, 1100, 700],
    "many": [i % 5 for i in range(300)],
}


def operands(counts, n, k, *, blocked=True, spare=0, kind="normal"):
    x = operand(kind, sum(counts) + spare, k, seed=1, device="cuda")
    w = operand("positive" if kind == "positive" else "normal", len(counts) * n, k, seed=2, device="cuda")
    a, a_scale = quantizer.group(x, None, False) if blocked else quantizer.token(x)
    parts = [quantizer.block(e, None, False) if blocked else quantizer.token(e) for e in w.view(len(counts), n, k)]
    b, b_scale = (torch.stack(column) for column in zip(*parts, strict=True))
    return a, a_scale, b, b_scale, torch.tensor(counts, device="cuda")


def through(backend, given, out):
    problem = problem_of(*given[:4], out.dtype)
    if (reason := BACKENDS.reason(backend, problem)) is not None:
        pytest.skip(reason) if backend == "sm90" and problem.sm != 90 else pytest.fail(reason)
    module = BACKENDS.module(backend)
    module.launch(*given, out, module.config(problem))


def check(out, given, spare=0):
    a, a_scale, b, b_scale, counts = given
    rows = len(a) - spare
    exact = reference.gemm(*given)[:rows]
    magnitude = reference.gemm(a.float().abs().to(a.dtype), a_scale, b.float().abs().to(b.dtype), b_scale, counts)[
        :rows
    ]
    if rows:
        found = worst(out[:rows], exact, gemm_bound(exact, magnitude, a.shape[1], out.dtype, "fp8"))
        assert found.ratio <= 1, found
    assert out[rows:].isnan().all(), "a row that no expert owns was written"


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("backend", "blocked"), [("sm90", True), ("sm90", False), ("triton", True), ("triton", False)])
def test_whatever_the_counts(counts, dtype, backend, blocked):
    given = operands(COUNTS[counts], 320, 384, blocked=blocked, spare=3)
    given[1][-3:] = torch.nan  # what lies in rows that nobody owns must not matter
    outs = [torch.full((len(given[0]), 320), torch.nan, dtype=dtype, device="cuda") for _ in range(2)]
    for out in outs:
        through(backend, given, out)
    check(outs[0], given, 3)
    assert torch.equal(outs[0].nan_to_num(7), outs[1].nan_to_num(7))


@pytest.mark.gpu(sm=90)
@pytest.mark.parametrize(
    "changes",
    [
        {"swap": 1, "by": 16, "output_tma": 0}, {"swap": 1, "by": 64, "output_tma": 0, "math_groups": 1},
        {"temps": 2}, {"temps": 2, "group": 2}, {"math_groups": 3, "stages": 4, "pieces": 2, "group": 3},
        {"by": 192, "stages": 4}, {"math_groups": 1, "temps": 2, "by": 64}, {"math_groups": 1, "by": 128},
        {"math_groups": 1, "by": 192, "stages": 5}, {"by": 64, "temps": 2},
        {"math_groups": 3, "stages": 3, "pieces": 2, "group": 3, "rotate": 1, "unroll": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("row", [0, 1])
def test_every_way_to_share_out_the_tiles(changes, row):
    """Bands of tiles, math groups without rows."""
    config = sm90_configs.Config(**{"grouped": 1, "row": row} | changes)
    for counts in COUNTS.values():
        given = operands(counts, 640, 1152, spare=3, blocked=not row)
        outs = [torch.full((len(given[0]), 640), torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        for out in outs:
            sm90.launch(*given, out, config)
        check(outs[0], given, 3)
        assert torch.equal(outs[0].nan_to_num(7), outs[1].nan_to_num(7))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind):
    for counts in ([5, 9, 2, 0], [300, 20, 0, 140]):
        given = operands(counts, 512, 2048, kind=kind)
        check(gemm_fp8_grouped(*given), given)
        given = operands([5, 9, 2, 0], 512, 2048, kind=kind, blocked=False)
        check(gemm_fp8_grouped(*given), given)


def test_more_tiles_than_processors():
    given = operands([700, 650, 20, 0, 900, 3], 1280, 512)
    check(gemm_fp8_grouped(*given), given)
    given = operands([16, 3, 20, 0, 9, 3], 9216, 512)
    check(gemm_fp8_grouped(*given), given)
    given = operands([1500, 0, 2100, 1900, 1], 1280, 1024)
    assert sm90.config(problem_of(*given[:4], torch.bfloat16)).unroll
    check(gemm_fp8_grouped(*given), given)


def test_a_graph_follows_new_counts():
    given = operands([4, 4, 4, 4], 256, 512)
    gemm_fp8_grouped(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemm_fp8_grouped(*given)
    for counts in ([4, 4, 4, 4], [16, 0, 0, 0], [0, 1, 15, 0]):
        given[4].copy_(torch.tensor(counts))
        out.fill_(torch.nan)
        graph.replay()
        check(out, given)


def test_compiled_whole():
    given = operands([4, 0, 9], 256, 512)
    compiled = torch.compile(lambda *tensors: gemm_fp8_grouped(*tensors) * 2, fullgraph=True)
    assert torch.equal(compiled(*given), gemm_fp8_grouped(*given) * 2)
