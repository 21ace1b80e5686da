"""The error model notices what a norm over the whole result does not."""

from __future__ import annotations

import pytest
import torch

from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.operands import KINDS, operand


def case(kind: str, k: int = 2048):
    a, b = operand(kind, 32, k, seed=1).double(), operand("normal", 48, k, seed=2).double()
    if kind == "positive":
        b = b.abs() + 0.5
    exact, magnitude = a @ b.t(), a.abs() @ b.abs().t()
    return exact, gemm_bound(exact, magnitude, k, torch.bfloat16, "fp8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_result_is_inside(kind: str):
    exact, bound = case(kind)
    assert worst(exact.to(torch.bfloat16), exact, bound).ratio <= 1


def test_a_lost_small_row_is_found_where_a_norm_finds_nothing():
    exact, bound = case("rows")
    out = exact.to(torch.bfloat16)
    out[0] = 0
    assert float((out - exact).norm() / exact.norm()) < 2e-3
    found = worst(out, exact, bound)
    assert found.index[0] == 0
    assert found.ratio > 10


def test_sums_that_were_never_promoted_are_found():
    """Half a percent of every one-signed sum, what K = 2048 loses without promotion, is outside."""
    exact, bound = case("positive")
    assert worst((exact * 0.995).to(torch.bfloat16), exact, bound).ratio > 1


def test_nan_is_never_inside_and_the_message_names_the_element():
    exact, bound = case("normal")
    out = exact.to(torch.bfloat16)
    out[3, 7] = torch.nan
    found = worst(out, exact, bound)
    assert found.index == (3, 7)
    assert found.ratio == float("inf")
    assert "element (3, 7) is nan" in str(found)
    exact, bound = case("zeros")
    assert worst(torch.zeros_like(exact), torch.zeros_like(exact), torch.zeros_like(bound)).ratio == 0


@pytest.mark.parametrize("kind", KINDS)
def test_operands_repeat_and_differ_by_seed(kind: str):
    assert torch.equal(operand(kind, 8, 300, seed=3), operand(kind, 8, 300, seed=3))
    assert not torch.equal(operand(kind, 8, 300, seed=3), operand(kind, 8, 300, seed=4))
