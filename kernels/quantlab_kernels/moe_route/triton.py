"""Two launches: parts of the logits, over some of the columns each, and choices from their sum, a token a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common.triton_launch import Launcher, begin
from quantlab_kernels.moe_route.op import Problem

_COLUMNS = 128  # of K in one step of a program
_PROGRAMS = 128  # that the parts of the logits should make


def supports(problem: Problem) -> str | None:
    """16-bit operands from sm_80 on."""
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if problem.dtype == torch.float32:
        return "products of float32 need another unit"
    if problem.experts > 1024 or problem.rule.groups > 32:
        return f"{problem.experts} experts in {problem.rule.groups} groups, takes up to 1024 in 32"
    return None


def launch(
    problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, weights: Tensor, index: Tensor
) -> None:
    """Fill logits, weights and index; x and weight contiguous."""
    p, rule = problem, problem.rule
    tokens = 16 if p.tokens <= 64 else 64
    experts = 16 if p.tokens <= 64 else 64
    tiles = triton.cdiv(p.tokens, tokens) * triton.cdiv(p.experts, experts)
    steps = triton.cdiv(p.k, _COLUMNS)
    each = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // tiles)))  # steps of a program
    parts = triton.cdiv(steps, each)
    partial = x.new_empty((parts, p.tokens, p.experts), dtype=torch.float32)
    _LOGITS(
        (triton.cdiv(p.tokens, tokens), triton.cdiv(p.experts, experts), parts), (x, weight, partial),
        (p.tokens, p.experts, p.k), (tokens, experts, _COLUMNS, each), 4,
    )  # fmt: skip
    width = triton.next_power_of_2(p.experts)
    full = width == p.experts and rule.groups & (rule.groups - 1) == 0
    constants = (
        triton.next_power_of_2(parts), width, triton.next_power_of_2(rule.choices + rule.shared), rule.choices,
        rule.shared, rule.sigmoid, rule.groups, rule.kept, rule.best, rule.normalized, bias is not None, full,
    )  # fmt: skip
    _CHOOSE(
        (p.tokens,), (partial, weights if bias is None else bias, logits, weights, index),
        (p.tokens, p.experts, parts, rule.factor), constants, 1 if width * parts <= 4096 else 4,
    )  # fmt: skip


@triton.jit
def _logits_kernel(
    x_ptr, weight_ptr, partial_ptr, tokens, experts, k, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    expert = (tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    total = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for step in range(STEPS):
        column = (part * STEPS + step) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column[None, :] < k
        x = tl.load(x_ptr + token[:, None] * k + column[None, :], mask=(token[:, None] < tokens) & inside, other=0.0)
        w = tl.load(
            weight_ptr + expert[:, None] * k + column[None, :], mask=(expert[:, None] < experts) & inside, other=0.0
        )
        total = tl.dot(x, tl.trans(w), total)
    at = partial_ptr + (part * tokens + token[:, None]) * experts + expert[None, :]
    tl.store(at, total, mask=(token[:, None] < tokens) & (expert[None, :] < experts))


@triton.jit
def _choose_kernel(
    partial_ptr, bias_ptr, logits_ptr, weights_ptr, index_ptr, tokens, experts, parts, factor, PARTS: tl.constexpr,
    EXPERTS: tl.constexpr, PLACES: tl.constexpr, CHOICES: tl.constexpr, SHARED: tl.constexpr, SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, NORMALIZED: tl.constexpr, BIAS: tl.constexpr,
    FULL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    expert, part = tl.arange(0, EXPERTS), tl.arange(0, PARTS)
    there = expert < experts
    at = partial_ptr + (part[:, None].to(tl.int64) * tokens + token) * experts + expert[None, :]
    logit = tl.sum(tl.load(at, mask=(part[:, None] < parts) & there[None, :], other=0.0), 0)
    kept = logit.to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + token * experts + expert, kept, mask=there)
    logit = tl.where(there, kept.to(tl.float32), float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        power = tl.exp(logit - tl.max(logit, 0))
        score = power / tl.sum(power, 0)
    choice = score
    if BIAS:
        choice += tl.load(bias_ptr + expert, mask=there, other=0.0).to(tl.float32)
    choice = tl.where(there, choice, float("-inf"))
    if GROUPS > 1 and EXPERTS % GROUPS == 0 and FULL:
        choice = tl.reshape(_of_kept_groups(tl.reshape(choice, (GROUPS, EXPERTS // GROUPS)), KEPT, BEST), (EXPERTS,))
    elif GROUPS > 1:
        choice = tl.where(_kept_groups(choice, expert, experts // GROUPS, GROUPS, KEPT, BEST), choice, float("-inf"))
    place = tl.arange(0, PLACES)
    chosen, weight = tl.zeros((PLACES,), tl.int32), tl.zeros((PLACES,), tl.float32)
    for i in tl.static_range(CHOICES):
        value, best = tl.max(choice, 0, return_indices=True)
        if BIAS:
            value = tl.sum(tl.where(expert == best, score, 0.0), 0)
        chosen = tl.where(place == i, best, chosen)
        weight = tl.where(place == i, value, weight)
        choice = tl.where(expert == best, float("-inf"), choice)
    if NORMALIZED:
        weight = weight / tl.sum(weight, 0)
    weight = tl.where(place < CHOICES, weight * factor, 1.0)
    chosen = tl.where(place < CHOICES, chosen, experts + place - CHOICES)
    out = token * (CHOICES + SHARED) + place
    tl.store(weights_ptr + out, weight, mask=place < CHOICES + SHARED)
    tl.store(index_ptr + out, chosen.to(tl.int64), mask=place < CHOICES + SHARED)


@triton.jit
def _of_kept_groups(choice, KEPT: tl.constexpr, BEST: tl.constexpr):
    """Groups [G, E / G] of powers of two, those that are not kept at minus infinity."""
    GROUPS: tl.constexpr = choice.shape[0]
    column, lane = tl.arange(0, choice.shape[1])[None, :], tl.arange(0, GROUPS)
    rest, good = choice, tl.zeros((GROUPS,), tl.float32)
    for _ in tl.static_range(BEST):
        value, at = tl.max(rest, 1, return_indices=True)
        good += value
        rest = tl.where(column == at[:, None], float("-inf"), rest)
    kept = tl.zeros((GROUPS,), tl.int32)
    for _ in tl.static_range(KEPT):
        best = tl.argmax(good, 0)
        kept = tl.where(lane == best, 1, kept)
        good = tl.where(lane == best, float("-inf"), good)
    return tl.where(kept[:, None] > 0, choice, float("-inf"))


@triton.jit
def _kept_groups(choice, expert, size, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr):
    """Whether each expert stands in one of the KEPT best groups of `size`."""
    LANES: tl.constexpr = 32
    lane = tl.arange(0, LANES)
    good = tl.full((LANES,), float("-inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        mine = tl.where(expert // size == group, choice, float("-inf"))
        sum = tl.max(mine, 0)
        for _ in tl.static_range(BEST - 1):
            mine = tl.where(expert == tl.argmax(mine, 0), float("-inf"), mine)
            sum += tl.max(mine, 0)
        good = tl.where(lane == group, sum, good)
    bits = tl.zeros((), tl.int32)
    for _ in tl.static_range(KEPT):
        best = tl.argmax(good, 0)
        bits |= 1 << best
        good = tl.where(lane == best, float("-inf"), good)
    return ((bits >> (expert // size)) & 1) != 0


_LOGITS = Launcher(_logits_kernel, early=True)
_CHOOSE = Launcher(_choose_kernel, early=True)
