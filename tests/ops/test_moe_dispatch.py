"""Routing, quantizing and gathering tokens for experts, and adding up what they found: against the plain steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantlab_kernels import moe_combine, moe_dispatch, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.moe_combine import reference as combining

CASES = [(1, 1, 4, 128), (7, 3, 5, 200), (64, 8, 300, 384), (2, 2, 2, 2048)]


def inputs(tokens, choices, experts, k, device="cpu", dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, k, generator=generator).to(device, dtype)
    index = torch.rand(tokens, max(experts, choices), generator=generator).topk(choices).indices
    index = torch.where(torch.rand(index.shape, generator=generator) < 0.2, experts, index)  # another rank's
    return x, index.to(device)


def check(x, index, experts, group):
    codes, scale, positions, counts = moe_dispatch(x, index, experts, group=group)
    assert counts.tolist() == [int((index == expert).sum()) for expert in range(experts)]
    expected, expected_scale = quantize_fp8_group(x) if group else quantize_fp8_token(x)
    place, starts = 0, counts.cumsum(0) - counts
    order = sorted((int(e), t, c) for t, row in enumerate(index.tolist()) for c, e in enumerate(row) if e < experts)
    for place, (expert, token, choice) in enumerate(order):
        assert positions[token, choice] == place >= int(starts[expert])
        assert torch.equal(codes[place].view(torch.uint8), expected[token].view(torch.uint8))
        assert torch.equal(scale[place], expected_scale[token])
    assert int((positions >= 0).sum()) == len(order)
    return positions


def check_combine(x, positions, dtype=torch.bfloat16):
    y = torch.full((positions.numel(), x.shape[1]), torch.nan, dtype=dtype, device=x.device)
    there = int(positions.max()) + 1
    y[:there] = torch.randn(there, x.shape[1], device=x.device, dtype=torch.float32).to(dtype)
    weights = torch.rand(positions.shape, device=x.device)
    out = moe_combine(y, positions, weights)
    exact = combining.combine(y, positions, weights)
    magnitude = combining.combine(y.abs(), positions, weights)
    bound = exact.abs() * 2.0**-8 + magnitude * (positions.shape[1] + 2) * 2.0**-24
    assert ((out.double() - exact).abs() <= bound).all()
    assert out.dtype == dtype


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_on_the_cpu(case, group):
    x, index = inputs(*case)
    check_combine(x, check(x, index, case[2], group))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("case", [*CASES, (300, 8, 256, 7168), (3000, 4, 16, 256)])
def test_on_the_gpu(case, group):
    x, index = inputs(*case, device="cuda")
    positions = check(x, index, case[2], group)
    check_combine(x, positions)
    assert torch.equal(positions, check(x, index, case[2], group))


@pytest.mark.gpu(sm=80)
def test_a_graph_follows_new_choices():
    x, index = inputs(16, 4, 8, 256, device="cuda")
    moe_dispatch(x, index, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, _, positions, counts = moe_dispatch(x, index, 8)
    for shift in range(3):
        index.copy_((index + shift) % 8)
        graph.replay()
        _, _, expected, expected_counts = moe_dispatch(x, index, 8)
        assert torch.equal(positions, expected)
        assert torch.equal(counts, expected_counts)


def test_what_does_not_fit_is_named():
    x, index = inputs(4, 2, 4, 128)
    for call, message in (
        (lambda: moe_dispatch(x.int(), index, 4), "needs floats of shape"),
        (lambda: moe_dispatch(x, index.int(), 4), "top_k_index is torch.int32"),
        (lambda: moe_dispatch(x, index[:2], 4), "needs int64 .4, k."),
        (lambda: moe_dispatch(x, index, 0), "0 experts"),
        (lambda: moe_combine(x, index, index.float()), "positions are torch.int64"),
        (lambda: moe_combine(x, index.int(), index), "weights are torch.int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_no_token_is_no_work():
    codes, scale, positions, counts = moe_dispatch(torch.zeros(0, 128), torch.zeros(0, 2, dtype=torch.int64), 3)
    assert (codes.shape, scale.shape, positions.shape) == ((0, 128), (0, 1), (0, 2))
    assert counts.tolist() == [0, 0, 0]


INTERPRETED = """
import torch
from quantlab_kernels.moe_combine import op as combine_op, reference as combining, triton as combine
from quantlab_kernels.moe_dispatch import op, reference, triton as backend
from quantlab_kernels.quantize_fp8 import reference as quantizer

backend.MOST_AT_ONCE, backend._BLOCK, backend._BLOCKS = 200, 64, 4  # the last two in blocks
for tokens, choices, experts, k in ((1, 1, 4, 128), (9, 3, 5, 200), (40, 8, 20, 384), (100, 3, 31, 128)):
    for group in (True, False):
        x = torch.randn(tokens, k).half()
        index = torch.randint(0, experts + 1, (tokens, choices))
        outs = op._fake(x, index, experts, group)
        for out in outs[2:]:
            out.fill_(-7)
        problem = op.Problem(tokens, k, choices, experts, group, x.dtype, sm=80)
        backend.launch(problem, x, index, *outs, None)
        codes, scale, positions, counts = outs
        expected, expected_counts = reference.route(index, experts)
        assert torch.equal(positions, expected) and torch.equal(counts, expected_counts), (tokens, group)
        plain = op._fake(x, index, experts, group)
        reference.scatter(*reference.quantize(x, group), positions, plain[:2])
        total = int(counts.sum())
        assert torch.equal(codes[:total].view(torch.uint8), plain[0][:total].view(torch.uint8))
        assert torch.equal(scale[:total], plain[1][:total])
        y, weights, out = torch.randn(tokens * choices, k), torch.rand(tokens, choices), torch.empty(tokens, k)
        y[total:] = torch.nan
        combine.launch(combine_op.Problem(tokens, k, choices, y.dtype, 80), y, positions, weights, out, None)
        assert torch.allclose(out.double(), combining.combine(y, positions, weights), rtol=1e-5, atol=1e-5)
print("right")
"""


def test_triton_kernels_interpreted(interpreted: Callable[[str], str]):
    assert interpreted(INTERPRETED).strip() == "right"
