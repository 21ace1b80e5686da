"""Mixed precision: the knapsack against every assignment, and the mixture of a real model against uniform schemes."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from quantlab import hf
from quantlab.cli import app
from quantlab.errors import PreflightError, UsageError
from quantlab.evaluate import evaluate
from quantlab.mixed import GRID, Choice, allocate, mix
from quantlab.pipeline import plan, quantize
from quantlab.scheme import Recipe, Rule
from quantlab.simulate import units_of

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
SMALL = {"samples": 2, "length": 96, "device": "cpu"}

a_choice = st.builds(Choice, st.just("s"), st.integers(1, 1000), st.floats(0, 10))
items = st.lists(st.lists(a_choice, min_size=1, max_size=3), min_size=1, max_size=5)


def cost(choices, picks):
    chosen = [item[pick] for item, pick in zip(choices, picks, strict=True)]
    return sum(c.nbytes for c in chosen), sum(c.kl for c in chosen)


def everything(choices):
    return [cost(choices, picks) for picks in itertools.product(*(range(len(item)) for item in choices))]


@settings(max_examples=80)
@given(items, st.integers(0, 4000))
def test_within_a_budget_nothing_is_better(choices, budget):
    fitting = [kl for size, kl in everything(choices) if size <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="allow more bits"):
            allocate(choices, budget=budget)
        return
    size, kl = cost(choices, allocate(choices, budget=budget))
    assert size <= budget
    assert kl == pytest.approx(min(fitting))


@settings(max_examples=80)
@given(items, st.floats(0, 20))
def test_within_a_limit_nothing_is_smaller(choices, limit):
    fitting = [size for size, kl in everything(choices) if kl <= limit - 1e-9]
    if not any(kl <= limit + 1e-9 for _, kl in everything(choices)):
        with pytest.raises(UsageError, match="or add the scheme none"):
            allocate(choices, limit=limit)
    elif fitting:
        size, kl = cost(choices, allocate(choices, limit=limit))
        assert kl <= limit + 1e-9
        assert size <= min(fitting)


def test_a_coarse_grid_never_passes_the_budget():
    choices = [[Choice("a", 10 * GRID + 7 * i, 1.0 + i), Choice("b", 77 * GRID + i, 0.1)] for i in range(20)]
    for budget in range(200 * GRID + 1500, 1600 * GRID, 97 * GRID):
        size, _ = cost(choices, allocate(choices, budget=budget))
        assert size <= budget


def test_fewer_bits_lose_more_and_the_size_is_kept():
    found = {bits: mix(MODEL, target_bits=bits, schemes=("fp8-dynamic", "none"), **SMALL) for bits in (9.0, 12.0)}
    assert 8 < found[9.0].bits <= 9 < found[12.0].bits <= 12
    assert found[9.0].measured.value > found[12.0].measured.value > 0
    for mixture in found.values():
        assert mixture.predicted == pytest.approx(mixture.measured.value, rel=0.5)
        again = Recipe.from_dict(mixture.recipe.to_dict())
        made = plan(MODEL, again)
        quantized = {d.module: d.scheme.name if d.scheme else "none" for d in made.decisions if d.kind == "linear"}
        assert list(quantized.values()).count("none") > 0
        weights = sum(d.info.elements for d in made.decisions if d.kind == "linear")
        kept = made.bytes_after - sum(d.info.nbytes for d in made.decisions if d.kind != "linear")
        assert 8 * kept / weights == pytest.approx(mixture.bits)


def test_four_and_eight_bits_beat_four_at_the_same_size(tmp_path):
    """The default schemes on a checkpoint: the recipe is kept, and the model runs as the mixture says."""
    found = mix(MODEL, target_bits=5.0, **SMALL)
    assert set(found.assigned.values()) <= {"int4-fp8", "fp8-dynamic", "none"}
    assert len(set(found.assigned.values())) > 1
    assert found.bits <= 5
    quantize(MODEL, found.recipe, tmp_path / "mixed", device="cpu")
    assert Recipe.from_toml(tmp_path / "mixed" / "quantlab" / "recipe.toml") == found.recipe
    model = hf.load(tmp_path / "mixed", dtype=torch.float32)
    kinds = Counter(type(module).__name__ for module in model.modules())
    assert kinds["Int4Fp8Linear"] > kinds["Fp8RowLinear"] > 0

    blind = Recipe("int4-fp8", tuple(Rule(p, "fp8-dynamic") for p in blindly(found)))
    plans = {name: plan(MODEL, name) for name in ("int4-fp8", "fp8-dynamic")}
    assert plan(MODEL, blind).bytes_after >= plan(MODEL, found.recipe).bytes_after
    evaluations = []
    for name, recipe in (("mixture", found.recipe), ("blind", blind)):
        quantize(MODEL, recipe, tmp_path / name, device="cpu")
        evaluations.append(evaluate(tmp_path / name, baseline=MODEL, windows=8, length=256).kl.value)
    assert evaluations[0] < 0.95 * evaluations[1]
    assert plans["int4-fp8"].bytes_after < plan(MODEL, found.recipe).bytes_after < plans["fp8-dynamic"].bytes_after


def blindly(found):
    """Patterns that spend as many bytes on the first layers as the mixture spends where it matters."""
    units = units_of(plan(MODEL, "int4-fp8"))
    total = sum(unit.elements for unit in units)
    spent, patterns = 4.125 * total, []
    for unit in units:
        if spent >= found.bits * total:
            break
        spent += (8.06 - 4.125) * unit.elements
        patterns += unit.patterns
    return patterns


def test_from_the_command_line(tmp_path):
    given = ["quantize", str(MODEL), "--target-bits", "10", "--mix", "fp8-dynamic,none", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*given, "--device", "cpu", "--ignore", "*.v_proj"])
    assert done.exit_code == 0, done.output
    assert "bits per weight" in done.output
    recipe = Recipe.from_toml(tmp_path / "out" / "quantlab" / "recipe.toml")
    assert recipe.rules[0] == Rule("*.v_proj", "none")
    refused = CliRunner().invoke(app, [*given, "--scheme", "int4"])
    assert isinstance(refused.exception, UsageError)
    assert "leave out --scheme" in str(refused.exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--effort", "bogus"), "unknown effort 'bogus'"),
        (("--kv", "bogus"), "unknown KV format 'bogus'"),
        (("-o", "full"), "full: exists; choose another with -o"),
        (("-o", str(MODEL / "out")), "lies in the model's own folder"),
        (("--revision", "v2"), "revision v2 needs a model on the hub"),
    ],
    ids=str,
)
def test_what_can_be_refused_is_before_the_search(options, said, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quantlab.mixed.mix", lambda *_, **__: pytest.fail("schemes are searched"))
    done = CliRunner().invoke(app, ["quantize", str(MODEL), "--target-bits", "5", "--device", "cpu", *options])
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)


def test_a_model_that_can_have_no_quantized_cache_is_refused_before_the_search(tiny, monkeypatch):
    monkeypatch.setattr("quantlab.mixed.mix", lambda *_, **__: pytest.fail("schemes are searched"))
    done = CliRunner().invoke(app, ["quantize", str(tiny("t5").folder), "--target-bits", "5", "--kv", "fp8"])
    assert isinstance(done.exception, PreflightError)
    assert "cannot have a quantized KV cache" in str(done.exception)


def test_schemes_are_chosen_on_the_revision_that_is_quantized(tmp_path, monkeypatch):
    asked = []

    def locate(model, revision, _):
        if model != "me/model":  # the output, as it is verified
            return Path(model)
        asked.append(revision)
        return MODEL

    monkeypatch.setattr("quantlab.source.locate", locate)
    monkeypatch.setattr("quantlab.source.hub_headers", lambda *_: nullcontext())
    given = ["quantize", "me/model", "--target-bits", "10", "--mix", "fp8-dynamic,none", "--revision", "v2"]
    done = CliRunner().invoke(app, [*given, "-o", str(tmp_path / "out"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert len(asked) >= 2
    assert set(asked) == {"v2"}


def test_a_limit_on_the_loss_is_kept():
    loose, tight = (mix(MODEL, max_kl=kl, schemes=("fp8-dynamic", "none"), **SMALL) for kl in (4e-3, 1e-3))
    assert loose.measured.value <= 4e-3
    assert tight.measured.value <= 1e-3
    assert loose.bits < tight.bits
    assert any(what == "KL, measured" for what, _ in tight.rows())


def test_refusals():
    for options, message in (
        ({}, "either target_bits or max_kl"),
        ({"target_bits": 5.0, "max_kl": 0.1}, "either target_bits or max_kl"),
        ({"target_bits": -1.0}, "target_bits = -1.0: must be more than 0"),
        ({"target_bits": 3.0, "schemes": ("fp8-dynamic", "none")}, r"fp8-dynamic take 8\.\d+ bits per weight at least"),
        ({"target_bits": 3.0}, r"target_bits = 3: int4-fp8, fp8-dynamic take 4\.\d+ bits .* allow more bits"),
        ({"target_bits": 20.0}, "target_bits = 20: the model has 16, so nothing would be quantized"),
        ({"target_bits": 6.0, "schemes": ("fp8-block", "int4")}, "the recipe mixes fp8-block, int4"),
        ({"max_kl": 1e-9, "schemes": ("fp8-dynamic", "none")}, "less than quantizing any group costs"),
        ({"max_kl": 1e-9, "schemes": ("fp8-dynamic",)}, "or add the scheme none"),
        ({"target_bits": 5.0, "schemes": ("fp8-dynamik",)}, "did you mean 'fp8-dynamic'"),
    ):
        with pytest.raises(UsageError, match=message):
            mix(MODEL, **options, **SMALL)
