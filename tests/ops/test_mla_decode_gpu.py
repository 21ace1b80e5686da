"""Absorbed attention over packed latents on the GPU, element by element against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from test_mla_decode import SCALE, Case, build, check

from quantlab_kernels import mla_decode
from quantlab_kernels.common.latent import FORMATS

pytestmark = pytest.mark.gpu(sm=80)

V3 = {"rank": 512, "rope": 64}
CASES = [
    *(Case(name, (1500, 64, 1, 0), heads=heads, **V3) for name in FORMATS for heads in (1, 5, 16, 64, 128)),
    *(Case(name, (700, 65), heads=16, sq=3, page=64, **V3) for name in FORMATS),
    *(Case(name, (700, 650), heads=5, start=(3, 130), **V3) for name in FORMATS),
    *(Case(name, (20000,), heads=16, even=True, **V3) for name in FORMATS),
    Case("fp8", (300, 17), heads=32, rank=256, rope=64),
    Case("int4", (300, 17), heads=40, rank=256, rope=32, page=16),
    Case("int8", (300, 17), heads=32, rank=128, rope=32, sq=2),
    Case("16bit", (300, 17), heads=40, rank=256, rope=32),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_MLA_DECODE_BACKEND", "triton")
    call = build(case, dtype, "cuda")
    check(mla_decode, call)
    first, second = call.run(mla_decode), call.run(mla_decode)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_lengths_change_inside_a_graph(name: str):
    call = build(Case(name, (600, 512), heads=16, **V3), torch.bfloat16, "cuda")
    call.run(mla_decode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call.run(mla_decode)
    for lengths in ([600, 512], [1, 300], [0, 17]):
        call.length.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, call.run(mla_decode)[0])


def test_queries_of_another_layout():
    """As a model makes them: a transposed view."""
    call = build(Case("fp8", (600, 512), heads=16, **V3), torch.bfloat16, "cuda")
    strided = call.q_latent.transpose(1, 2).contiguous().transpose(1, 2)
    given = call.q_rope, call.cache, call.length
    assert torch.equal(
        mla_decode(strided, *given, scale=SCALE)[0], mla_decode(call.q_latent.contiguous(), *given, scale=SCALE)[0]
    )
