"""Routers of experts in two launches instead of about ten.

transformers' routers differ in a handful of steps: scores by softmax or sigmoid, a bias for the choice, groups, weights
that add up to one, a factor. Which of them a router does is found by trying: a rule is taken where, for random tokens,
it chooses what the router's own forward chooses, with the same weights, from the same logits. Others stay as they are.

Weights stay float32 where a router rounds them to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.experts import Experts
from quantlab.fusion import wanted
from quantlab_kernels import moe_route
from quantlab_kernels.moe_route import Rule
from quantlab_kernels.moe_route.reference import choose, logits_of

_TOKENS = 512  # that a router is tried on: so many that alike rules part in some
_BIAS = "e_score_correction_bias"


def fuse_routers(model: nn.Module) -> int:
    """Give the routers beside our experts a forward in two launches; returns how many that were."""
    if not wanted():
        return 0
    found = 0
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), Experts):
            routers = (getattr(module, name, None) for name in ("gate", "router"))
            found += any(_fuse(router) for router in routers if isinstance(router, nn.Module))
    return found


def _fuse(router: Any) -> bool:
    weight = getattr(router, "weight", None)
    usable = type(weight) is nn.Parameter and weight.ndim == 2 and not weight.is_meta and weight.element_size() == 2
    if not usable or "forward" in vars(router) or not isinstance(getattr(router, "top_k", None), int):
        return False
    if len(list(router.parameters())) != 1 or not {name for name, _ in router.named_buffers()} <= {_BIAS}:
        return False  # a bias of logits, or one that is not where it is looked for
    with torch.no_grad():
        made = _observed(router)
    if made is None:
        return False
    router.forward = made
    return True


class Route:
    """The `forward` of a router: logits [T, E], weights [T, k] and experts [T, k] of hidden states."""

    def __init__(self, router: Any, rule: Rule, rounded: bool) -> None:
        self.router, self.rule, self.rounded = router, rule, rounded
        self.sharing: Callable[[], bool] | None = None

    def share(self, experts: int, sharing: Callable[[], bool]) -> None:
        """Let so many further experts be every token's last choices, whenever `sharing` says so."""
        self.rule, self.sharing = replace(self.rule, shared=experts), sharing

    def chooses(self, hidden_states: Tensor) -> bool:
        """Whether it is the rule that chooses, and not the router's own forward."""
        fits = not torch.is_grad_enabled() and bool(hidden_states.dtype == self.router.weight.dtype)
        return fits and (self.sharing is None or self.sharing())

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router: Any = self.router
        if not self.chooses(hidden_states):
            return type(router).forward(router, hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        bias = getattr(router, _BIAS, None)
        return moe_route(flat, router.weight, self.rule, bias=bias, rounded=self.rounded)


def _observed(router: Any) -> Route | None:
    """The rule by which a router chooses, held against its own forward."""
    weight = router.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, weight.shape[1], generator=generator).to(weight) / weight.float().std().clamp(1e-3)
    hidden = hidden * weight.shape[1] ** -0.5
    with _any_bias(router):
        try:
            logits, weights, index = router.forward(hidden)
        except Exception:  # it takes or returns something else: any error says that it is not such a router
            return None
        if logits.shape != (_TOKENS, len(weight)) or index.dtype != torch.int64 or index.shape != weights.shape:
            return None
        rounded = logits.dtype == weight.dtype
        ours = logits_of(hidden, weight, rounded).float()
        if not (ours - logits.float()).abs().max() <= 0.02 * logits.float().abs().max():
            return None
        bias = getattr(router, _BIAS, None)
        fits = [_fitted(rule, logits, bias, weights, index) for rule in _rules(router)]
    _, rule = max((fit for fit in fits if fit is not None), key=lambda fit: fit[0], default=(0.0, None))
    return None if rule is None else Route(router, rule, rounded)


@contextmanager
def _any_bias(router: Any) -> Iterator[None]:
    """A bias for the choice that makes a difference, meanwhile."""
    bias = getattr(router, _BIAS, None)
    if bias is None:
        yield
        return
    before = bias.clone()
    bias.copy_(torch.rand(bias.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    try:
        yield
    finally:
        bias.copy_(before)


def _rules(router: Any) -> Iterator[Rule]:
    """The rules that a router may follow, by its attributes."""
    groups, kept = (next((n for name in names if isinstance(n := getattr(router, name, None), int)), 1)
                    for names in (("num_group", "n_group"), ("topk_group",)))  # fmt: skip
    size = len(router.weight) // max(groups, 1)
    for sigmoid, normalized, best in product((False, True), (False, True), (1, 2) if groups > 1 else (1,)):
        if best <= size and len(router.weight) % groups == 0 and router.top_k <= size * (kept if groups > 1 else 1):
            yield Rule(router.top_k, sigmoid, groups, kept, best, normalized)


def _fitted(
    rule: Rule, logits: Tensor, bias: Tensor | None, weights: Tensor, index: Tensor
) -> tuple[float, Rule] | None:
    """In how many of the tokens the rule chooses what was chosen, and the rule with the factor of the weights; None
    where it is another rule. Scores that are alike may part, and rules that are alike choose alike in most tokens."""
    found, chosen = choose(logits, bias, rule)
    if found.shape != weights.shape:
        return None
    share = float((index.sort(-1).values == chosen.sort(-1).values).all(-1).float().mean())
    if not share > 0.8:
        return None
    wanted, found = weights.float().sort(-1).values, found.sort(-1).values
    factor = float(wanted.sum() / found.sum())
    near = 2.0**-7 if weights.element_size() == 2 else 1e-4
    if not bool(((found * factor - wanted).abs() <= near * wanted.abs()).all()):
        return None
    return share, replace(rule, factor=1.0 if abs(factor - 1) < near else round(factor, 6))
