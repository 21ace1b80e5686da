"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.moe_route import reference

BACKENDS = Backends("moe_route", ("triton", "eager"), last_resort="eager")
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Rule:
    """How logits become choices and weights.

    choices      k, experts of a token                sigmoid  scores are sigmoids, else a softmax over all experts
    groups       the experts stand in so many groups, of which the `kept` best stay; a group is as good as the sum of
                 its `best` highest scores
    normalized   weights of a token add up to 1, before they are multiplied by `factor`
    shared       so many experts behind the E that are chosen from are every token's last choices, with a weight of 1
    """

    choices: int
    sigmoid: bool = False
    groups: int = 1
    kept: int = 1
    best: int = 1
    normalized: bool = False
    factor: float = 1.0
    shared: int = 0

    @property
    def numbers(self) -> tuple[int | float, ...]:
        """The fields in order; torch 2.9 cannot compile `dataclasses.astuple`, which copies deeply."""
        return (
            self.choices, self.sigmoid, self.groups, self.kept, self.best, self.normalized, self.factor, self.shared
        )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """tokens of k columns to experts by a rule; bias: choices are made with one."""

    tokens: int
    k: int
    experts: int
    rule: Rule
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: tokens and weights read once, logits, weights and indices written."""
        read = (self.tokens + self.experts) * self.k * self.dtype.itemsize
        return read + self.tokens * (4 * self.experts + 12 * self.rule.choices)


def moe_route(
    x: Tensor, weight: Tensor, rule: Rule, *, bias: Tensor | None = None, rounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, E], weights [T, k + shared] float32 and experts [T, k + shared] int64 of tokens.

    x        [T, K] bfloat16, float16 or float32     weight  [E, K] of the same dtype
    bias     [E] float, added to scores for the choice alone
    rounded  logits are rounded to x's dtype, as a linear layer does; else they are float32, as of operands in float32

    Of scores that are alike either may be chosen. Never waits for the GPU. Raises RuntimeError for operands that
    do not fit together.
    """
    return _OP(x, weight, bias, rounded, *rule.numbers)


def _rule(*fields: object) -> Rule:
    return Rule(*fields)  # type: ignore[arg-type]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, rule: Rule) -> None:
    require(
        x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1] and x.dtype == weight.dtype
        and x.dtype in _INPUTS,
        lambda: (
            f"moe_route: x {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}; needs floats of "
            "one dtype, [T, K] and [E, K]"
        ),
    )  # fmt: skip
    experts = weight.shape[0]
    require(
        bias is None or (tuple(bias.shape) == (experts,) and bias.dtype in _INPUTS and bias.is_contiguous()),
        lambda: f"moe_route: bias needs {experts} floats without gaps",
    )
    size = experts // max(rule.groups, 1)
    require(
        rule.groups > 0 and experts % rule.groups == 0 and 0 < rule.kept <= rule.groups and 0 < rule.best <= size
        and 0 < rule.choices <= size * (rule.kept if rule.groups > 1 else 1),
        lambda: f"moe_route: {experts} experts cannot be chosen from by {rule}",
    )  # fmt: skip


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, rounded: bool, *rule: object
) -> tuple[Tensor, Tensor, Tensor]:
    made = _rule(*rule)
    _check(x, weight, bias, made)
    shape = x.shape[0], made.choices + made.shared
    return (
        x.new_empty((x.shape[0], weight.shape[0]), dtype=x.dtype if rounded else torch.float32),
        x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64),
    )  # fmt: skip


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, rounded: bool, *rule: object) -> tuple[Tensor, Tensor, Tensor]:
    made = _rule(*rule)
    _check(x, weight, bias, made)
    logits = reference.logits_of(x, weight, rounded)
    return logits, *reference.choose(logits, bias, made)


def _cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, rounded: bool, *rule: object
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outs = _fake(x, weight, bias, rounded, *rule)
    if x.numel() == 0:
        return outs
    tokens, k = x.shape
    problem = Problem(tokens, k, weight.shape[0], _rule(*rule), bias is not None, x.dtype, gpu_of(x).sm)
    with device_of(x):
        BACKENDS.select(problem).launch(problem, x.contiguous(), weight.contiguous(), bias, *outs)
    return outs


_OP = define(
    "moe_route(Tensor x, Tensor weight, Tensor? bias, bool rounded, int choices, bool sigmoid, int groups, int kept,"
    " int best, bool normalized, float factor, int shared) -> (Tensor, Tensor, Tensor)",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
