"""Choosing experts: rules of real routers, the kernel against the definition, ties and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quantlab_kernels import moe_route
from quantlab_kernels.moe_route import op, reference
from quantlab_kernels.moe_route import triton as backend
from quantlab_kernels.moe_route.op import Problem, Rule

RULES = {
    "softmax": (Rule(6), 64),
    "normalized": (Rule(8, normalized=True), 128),
    "few": (Rule(2, normalized=True), 8),
    "shared": (Rule(6, factor=3.0, shared=2), 64),
    "groups by their best": (Rule(6, groups=8, kept=3, factor=16.0), 160),
    "groups by two": (Rule(8, sigmoid=True, groups=8, kept=4, best=2, normalized=True, factor=2.5), 256),
}


def check(name: str, tokens: int, k: int, dtype: torch.dtype, device: str, rounded: bool, launch=None) -> None:
    """Logits within their rounding; choices are the definition's for these logits, weights their scores."""
    rule, experts = RULES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator).to(device, dtype)
    weight = (torch.randn(experts, k, generator=generator) * k**-0.5).to(device, dtype)
    bias = (torch.rand(experts, generator=generator) * 0.2).to(device) if rule.sigmoid else None
    logits, weights, index = (launch or moe_route)(x, weight, rule, bias=bias, rounded=rounded)
    if rule.shared:
        assert bool((weights[:, rule.choices :] == 1).all())
        assert bool((index[:, rule.choices :] == torch.arange(experts, experts + rule.shared, device=device)).all())
        weights, index, rule = weights[:, : rule.choices], index[:, : rule.choices], replace(rule, shared=0)
    exact = x.double() @ weight.double().T
    assert logits.dtype == (dtype if rounded else torch.float32)
    step = 2.0**-7 if rounded and dtype != torch.float32 else 2.0**-16
    assert bool(((logits.double() - exact).abs() <= step * (exact.abs() + 1)).all())
    scores = logits.float().sigmoid() if rule.sigmoid else logits.float().softmax(-1)
    found = scores.gather(-1, index)
    expected = found / found.sum(-1, keepdim=True) if rule.normalized else found
    torch.testing.assert_close(weights, expected * rule.factor, rtol=2e-5, atol=1e-7)
    _, chosen = reference.choose(logits, bias, rule)
    alike = (index.sort(-1).values == chosen.sort(-1).values).all(-1)
    assert float(alike.float().mean()) > (0.75 if rounded else 0.98)  # of scores that are alike either may be chosen
    assert bool((index.sort(-1).values.diff(dim=-1) > 0).all())
    if rule.groups == 1:
        torch.testing.assert_close(found.sum(-1), scores.gather(-1, chosen).sum(-1), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rules(name: str, rounded: bool):
    check(name, 9, 96, torch.bfloat16, "cpu", rounded)


def test_a_choice_worked_by_hand():
    """Two groups of two: the first has the highest score, the second the higher sum; the bias chooses, but the weights
    are scores."""
    x = torch.tensor([[1.0]])
    weight = torch.tensor([[2.0], [-3.0], [1.0], [1.5]])
    rule = Rule(1, sigmoid=True, groups=2, kept=1, best=2, factor=3.0)
    logits, weights, index = moe_route(x, weight, rule, bias=torch.tensor([0.0, 0.0, 0.2, 0.0]))
    assert logits.tolist() == [[2.0, -3.0, 1.0, 1.5]]
    assert index.tolist() == [[2]]
    torch.testing.assert_close(weights, 3 * torch.tensor([[1.0]]).sigmoid())


def test_what_does_not_fit_is_refused():
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="needs floats of one dtype"):
        moe_route(x, weight.half(), Rule(1))
    with pytest.raises(RuntimeError, match="4 experts cannot be chosen from by Rule"):
        moe_route(x, weight, Rule(5))
    with pytest.raises(RuntimeError, match="bias needs 4 floats"):
        moe_route(x, weight, Rule(1), bias=torch.zeros(3))


def test_problems_without_a_kernel_have_a_reason():
    problem = Problem(16, 2048, 64, Rule(6))
    assert backend.supports(problem) is None
    assert "another unit" in str(backend.supports(replace(problem, dtype=torch.float32)))
    assert "takes up to 1024" in str(backend.supports(replace(problem, experts=2048)))
    assert "needs sm_80" in str(backend.supports(replace(problem, sm=75)))


INTERPRETED = """
import torch
import test_moe_route as tests
from quantlab_kernels.moe_route import op, triton as backend
def launch(x, weight, rule, *, bias, rounded):
    outs = op._fake(x, weight, bias, rounded, *rule.numbers)
    backend.launch(op.Problem(*x.shape, len(weight), rule, bias is not None, x.dtype, 80), x, weight, bias, *outs)
    return outs
for name in tests.RULES:
    tests.check(name, 3, 200, torch.float16, "cpu", name == "few", launch)
"""


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 100, 3000])
@pytest.mark.parametrize("name", RULES)
def test_on_the_gpu(name: str, tokens: int, rounded: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_MOE_ROUTE_BACKEND", "triton")
    check(name, tokens, 2048, torch.bfloat16, "cuda", rounded)
    assert op.BACKENDS.reason("triton", Problem(tokens, 2048, 64, Rule(6))) is None
