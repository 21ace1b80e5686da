"""The numbers themselves: slices, heads, and standard errors checked by drawing the data again and again."""

from __future__ import annotations

import math

import pytest
import torch

from quantlab import scoring
from quantlab.errors import VerificationError
from quantlab.scoring import Estimate, estimate, exponential, head_of, hidden_states, interval, score_window


def drawn(generator: torch.Generator, windows: int, tokens: int) -> torch.Tensor:
    """Losses of tokens as text has them: windows differ, and neighbours within a window resemble each other."""
    noise = torch.randn(windows, tokens, generator=generator)
    for t in range(1, tokens):
        noise[:, t] += 0.7 * noise[:, t - 1]
    return 3 + 0.5 * torch.randn(windows, 1, generator=generator) + noise


def test_the_standard_error_is_the_spread_of_the_mean_over_fresh_data():
    generator = torch.Generator().manual_seed(0)
    draws = [drawn(generator, 12, 50) for _ in range(2000)]
    found = [estimate(d) for d in draws]
    true_error = torch.tensor([e.value for e in found]).std().item()
    claimed = math.sqrt(sum(e.error**2 for e in found) / len(found))
    assert claimed == pytest.approx(true_error, rel=0.05)
    of_tokens = math.sqrt(sum(float(d.var() / d.numel()) for d in draws) / len(draws))
    assert of_tokens < 0.5 * true_error  # what counting tokens as independent would claim


def test_the_error_of_a_paired_difference_is_that_of_the_difference():
    generator = torch.Generator().manual_seed(0)
    first = drawn(generator, 40, 50)
    second = first + 0.01 * torch.randn(first.shape, generator=generator) + 0.02
    ratio = exponential(estimate(second - first))
    assert ratio.value == pytest.approx(math.exp(0.02), abs=3 * ratio.error)
    assert ratio.error < 0.02 * estimate(first).error


def test_one_window_has_no_error_and_says_so():
    assert estimate(torch.ones(1, 9)) == Estimate(1.0, None)
    assert exponential(Estimate(0.0, None)) == Estimate(1.0, None)
    assert exponential(Estimate(1.0, 0.1)).error == pytest.approx(0.1 * math.e)
    assert str(Estimate(0.01234567, 0.00056)) == "0.012346 ± 0.00056"


@pytest.mark.parametrize("windows", [4, 12])
def test_the_interval_holds_the_truth_95_times_in_100(windows):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, windows, 1, generator=generator, dtype=torch.float64) + 0.3
    bounds = [interval(estimate(draw), windows) for draw in draws]
    held = sum(low < 0.3 < high for low, high in bounds) / len(bounds)
    assert 0.935 < held < 0.965  # three standard deviations of a binomial are 0.015
    assert interval(Estimate(1.0, 0.1), 3) is None
    assert interval(Estimate(1.0, None), 9) is None


def test_slices_give_what_all_logits_at_once_give(monkeypatch):
    torch.manual_seed(0)
    window, hidden, base = torch.randint(0, 30, (20,)), torch.randn(20, 8), torch.randn(19, 8)
    heads = [torch.randn(30, 8) for _ in range(2)]
    monkeypatch.setattr(scoring, "SLICE_ELEMENTS", 100)  # three tokens
    nll, base_nll, kl, agree = score_window(window, hidden, lambda h: h @ heads[0].T, base, lambda h: h @ heads[1].T)
    log_q = torch.log_softmax(hidden[:-1].double() @ heads[0].double().T, 1)
    log_p = torch.log_softmax(base.double() @ heads[1].double().T, 1)
    targets = window[1:, None]
    torch.testing.assert_close(nll.double(), -log_q.gather(1, targets)[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(base_nll.double(), -log_p.gather(1, targets)[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(agree.bool(), log_p.argmax(1) == log_q.argmax(1))


def test_slices_bound_the_logits_in_memory(monkeypatch):
    monkeypatch.setattr(scoring, "SLICE_ELEMENTS", 64)
    rows = []

    def head(hidden):
        rows.append(len(hidden))
        return torch.zeros(len(hidden), 16)

    score_window(torch.zeros(30, dtype=torch.int64), torch.zeros(30, 4), head, None, None)
    assert max(rows) == 4
    assert sum(rows) == 29


def test_forbidden_tokens_add_nothing_and_broken_logits_are_refused():
    window, hidden = torch.tensor([0, 1, 2]), torch.zeros(3, 1)

    def head(logits):
        return lambda h: torch.tensor(logits).expand(len(h), -1)

    masked = head([1.0, 0.0, 0.5, -math.inf])
    _, _, kl, agree = score_window(window, hidden, masked, hidden, masked)
    assert kl.tolist() == [0.0, 0.0]
    assert agree.tolist() == [1.0, 1.0]
    with pytest.raises(VerificationError, match=r"logits of the model are not finite at token 0 of a window"):
        score_window(window, hidden, head([1.0, math.nan, 0.0]), None, None)
    with pytest.raises(VerificationError, match=r"logits of the baseline are not finite"):
        score_window(window, hidden, masked, hidden, head([1.0, math.inf, 0.0, 0.0]))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3", "gemma3_vision", "phi3", "deepseek_v3"])
def test_a_head_gives_the_logits_of_the_model(tiny, name):
    model = tiny(name).model_class.from_pretrained(tiny(name).folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = hidden_states(model, ids)
        found = torch.cat([head_of(model)(part) for part in hidden[1].split(5)])
    torch.testing.assert_close(found, expected[1], rtol=1e-5, atol=1e-5)
    assert "forward" not in model.base_model.__dict__


def test_a_head_has_its_soft_caps_and_scales():
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 40,
    }  # fmt: skip
    models = (
        Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.01, eos_token_id=1, bos_token_id=2)),
        CohereForCausalLM(CohereConfig(**sizes, logit_scale=9.0, eos_token_id=1, bos_token_id=2)),
    )
    ids = torch.arange(3, 13)[None]
    for model in models:
        with torch.no_grad():
            expected = model.eval()(input_ids=ids).logits[0]
            found = head_of(model)(hidden_states(model, ids)[0])
            plain = model.lm_head(hidden_states(model, ids)[0])
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(plain, expected)
