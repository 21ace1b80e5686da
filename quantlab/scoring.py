"""Numbers that say how far one language model is from another, with standard errors that hold for correlated tokens.

Everything is computed from the last hidden states, and logits only for a slice of tokens at a time: a full copy for a
window of 1024 tokens and a vocabulary of 256 k would be 1 GB per model. So a baseline can be kept as its hidden states
(tokens x hidden x 2 bytes: 12 MB where its logits would be 2 GB), and gives back its logits exactly.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.architecture import meta_model
from quantlab.errors import UsageError, VerificationError
from quantlab.source import Source
from quantlab_calib.capture import forward_replaced

SLICE_ELEMENTS = 1 << 24  # of logits at a time: 64 MB in float32

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where one window leaves no way to tell."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.5g}" if self.error is None else f"{self.value:.5g} ± {self.error:.2g}"


def estimate(per_token: Tensor) -> Estimate:
    """Mean over all tokens of [windows, tokens] and its standard error, from the spread of the windows' means.

    Tokens of one window are not independent: they share a topic and a context. Windows are taken as independent (they
    lie apart and never overlap), so that the error is ``std(window means) / sqrt(windows)`` (batch means; Kish, Survey
    Sampling, 1965, ch. 5). The usual ``std / sqrt(tokens)`` is too small by a factor of two and more on real text.
    """
    means = per_token.to(torch.float64).mean(dim=1)
    count = means.numel()
    error = float(means.std(correction=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(means.mean()), error)


def interval(e: Estimate, windows: int) -> tuple[float, float] | None:
    """The 95 % confidence interval of an estimate from so many windows; None for fewer than four.

    Student's t, its quantile by the expansion of Abramowitz and Stegun, 26.7.5: right to 1 % from four windows on.
    """
    if e.error is None or windows < 4:
        return None
    z, freedom = statistics.NormalDist().inv_cdf(0.975), windows - 1
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    reach = e.error * (z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))
    return e.value - reach, e.value + reach


def exponential(e: Estimate) -> Estimate:
    """exp of an estimate, its error to first order."""
    value = math.exp(e.value)
    return Estimate(value, None if e.error is None else value * e.error)


@dataclass(frozen=True)
class Scores:
    """Per scored token, float32 [windows, tokens]: negative log-likelihood in nats of the model and of the baseline,
    KL(baseline || model) in nats, and whether both find the same token the likeliest. The latter three without a
    baseline are None."""

    nll: Tensor
    baseline_nll: Tensor | None = None
    kl: Tensor | None = None
    agree: Tensor | None = None

    def after(self, context: int) -> Scores:
        """Without the tokens that only serve as context: of a window's first `context` none is scored."""
        return self._each(lambda column: column[:, max(context - 1, 0) :])

    def split(self, windows: list[int]) -> list[Scores]:
        """Parts of so many windows each."""
        ends = torch.tensor(windows).cumsum(0).tolist()
        return [self._each(operator.itemgetter(slice(a, b))) for a, b in zip([0, *ends], ends, strict=False)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Scores:
        rest = (None if column is None else change(column) for column in (self.baseline_nll, self.kl, self.agree))
        return Scores(change(self.nll), *rest)


class _BaseOutput(tuple[Tensor]):
    """What a base model returns, for a head that wants its hidden states and asks for the rest in vain."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def open_predictor(model: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> Source:
    """A model that predicts the next token of a text; raises UsageError for any other, and
    PreflightError for a config that transformers refuses, before anything is loaded or weights are downloaded."""

    def require_predictor(source: Source) -> None:
        empty = meta_model(source.folder, trust_remote_code)
        if empty is None:
            raise UsageError(f"{model}: transformers cannot build it; if it brings code: --trust-remote-code")
        if not empty.can_generate() or getattr(empty.config, "is_encoder_decoder", False):
            raise UsageError(
                f"{model}: {type(empty).__name__} does not predict the next token: no perplexity, KL or top-1; "
                f"compare its outputs with those of the original on your own data"
            )

    source = Source.open(model, revision, before_download=require_predictor)
    require_predictor(source)
    return source


def base_of(model: Any) -> Any:
    """The part of a causal model that ends in hidden states. Raises UsageError where it has none."""
    base = getattr(model, "base_model", model)
    if base is model:
        raise UsageError(f"{type(model).__name__} has no base model whose hidden states could be scored")
    return base


def hidden_states(model: Any, windows: Tensor) -> Tensor:
    """Last hidden states [rows, tokens, hidden] of windows of token ids [rows, tokens].

    A model with a quantized KV cache (`cache.use`) reads a window in steps of few tokens, as while generating: every
    step sees what is before it out of the packed cache. Raises VerificationError for states that are not finite.
    """
    states = _states(model, windows)
    if not bool(states.isfinite().all()):
        where = first_broken(model, windows)
        raise VerificationError(
            f"{getattr(model, 'name_or_path', '') or type(model).__name__}: hidden states are not finite, first in "
            f"{where}: broken weights or scales, or its dtype overflows; try `quantlab verify` and --dtype float32"
        )
    return states


def first_broken(model: Any, windows: Tensor) -> str:
    """Name of the first module, in the order in which they finish, that returns what is not finite."""
    found: list[str] = []

    def see(name: str, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else []
        if not found and not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
            found.append(name)

    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [m.register_forward_hook(lambda _m, _i, output, name=name: see(name, output)) for name, m in modules]
    try:
        _states(model, windows)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "no module by itself"


@torch.no_grad()
def _states(model: Any, windows: Tensor) -> Tensor:
    if hasattr(model, "quantlab_kv"):
        from quantlab.cache import FEW, new_cache

        cache, base = new_cache(model), base_of(model)
        steps = [base(input_ids=part, past_key_values=cache, use_cache=True) for part in windows.split(FEW, 1)]
        return torch.cat([step.last_hidden_state for step in steps], 1)
    return base_of(model)(input_ids=windows, use_cache=False, return_dict=True).last_hidden_state


def head_of(model: Any) -> Logits:
    """[tokens, hidden] -> logits [tokens, vocabulary] in the model's dtype, by the model's own code after its base.

    The output layer alone would miss what some models do around it (soft caps, scales, transforms).
    """
    base = base_of(model)

    def logits(hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        with forward_replaced(base, lambda *_args, **_kwargs: _BaseOutput((hidden[None],))):
            return model(input_ids=ids, use_cache=False).logits[0]

    return logits


@torch.no_grad()
def score_window(
    window: Tensor, hidden: Tensor, head: Logits, base_hidden: Tensor | None, base_head: Logits | None
) -> tuple[Tensor, ...]:
    """nll, and with a baseline also its nll, KL and agreement, for all tokens of a window but the first: [tokens - 1].

    window       token ids [tokens]
    hidden       [tokens, hidden] of the model; base_hidden of the baseline
    Raises VerificationError for logits that are not finite.
    """
    parts = []
    start, count = 0, window.shape[0] - 1
    step = 1  # the first slice tells the size of the vocabulary
    while start < count:
        stop = min(start + step, count)
        targets = window[start + 1 : stop + 1].to(hidden.device)
        log_q = _log_probabilities(head(hidden[start:stop]), "the model", start)
        step = max(1, SLICE_ELEMENTS // log_q.shape[-1])
        columns = [-log_q.gather(1, targets[:, None])[:, 0]]
        if base_hidden is not None and base_head is not None:
            log_p = _log_probabilities(base_head(base_hidden[start:stop].to(hidden.device)), "the baseline", start)
            log_p = log_p.to(log_q.device)
            columns.append(-log_p.gather(1, targets[:, None])[:, 0])
            columns.append(_divergence(log_p, log_q))
            columns.append((log_p.argmax(dim=1) == log_q.argmax(dim=1)).to(torch.float32))
        parts.append(torch.stack(columns).cpu())
        start = stop
    return tuple(torch.cat(parts, dim=1))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row. A token that both forbid with a logit of -inf adds nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).sum(dim=1)


def _log_probabilities(logits: Tensor, whose: str, start: int) -> Tensor:
    logits = logits.to(torch.float32)
    broken = (logits.isnan() | (logits == math.inf)).any(dim=1)
    if bool(broken.any()):
        token = start + int(broken.nonzero()[0, 0])
        raise VerificationError(
            f"logits of {whose} are not finite at token {token} of a window, its hidden states are: the output layer "
            f"has broken weights, or its dtype overflows; try `quantlab verify` and --dtype float32"
        )
    return torch.log_softmax(logits, dim=1)
