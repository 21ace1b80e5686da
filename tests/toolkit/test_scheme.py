"""Recipes: what they say, how they round-trip, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import UsageError
from quantlab.scheme import Calibration, Recipe, Rule, scheme_named

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda s: not s.startswith("re:")
)
rules = st.builds(Rule, match=names, scheme=st.sampled_from(["fp8-block", "none"]))
recipes = st.builds(
    Recipe,
    scheme=st.just("fp8-block"),
    rules=st.lists(rules, max_size=4).map(tuple),
    calibration=st.none() | st.builds(Calibration, data=names, samples=st.integers(1, 9), length=st.integers(2, 99)),
)


@given(recipes)
def test_toml_round_trip(tmp_path_factory, recipe: Recipe):
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe


def test_a_recipe_of_an_editor_that_puts_a_mark_before_it(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text('scheme = "fp8-dynamic"', encoding="utf-8-sig")
    assert Recipe.from_toml(path) == Recipe("fp8-dynamic")


def test_a_name_is_what_is_advised_and_a_recipe_what_it_says():
    assert Recipe.of("int4").calibration == Recipe.of("int4-fp8").calibration == Calibration(effort="fast")
    assert Recipe.of("fp8-block").calibration is Recipe.of("fp8-dynamic").calibration is None
    assert Recipe.of(Recipe("int4")).calibration is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme = 'fp8-dynamc'", "did you mean 'fp8-dynamic'?"),
        ("schemes = 'fp8-block'", "unknown key 'schemes'"),
        ("scheme = 3", "scheme = 3, needs str"),
        ("[[layers]]\nmatch = 're:('\nscheme = 'none'", "is not a regular expression"),
        ("[[rules]]\nmatch = '*'", "unknown key 'rules'; known: calibration, kv, layers, scheme"),
        ("[[layers]]\nmatch = '*'", "[layers]: needs scheme too"),
        ("[layers]\nmatch = '*'", "layers: got {'match': '*'}, needs tables, each begins with [[layers]]"),
        ("layers = [3]", "got 3, needs a table"),
        ("[calibration]\nsamples = 0", "needs 1 x 2 at least"),
        ("[calibration]\nactivations = 'sometimes'", "known: dynamic, static"),
        ("scheme = 'none'", "quantizes nothing"),
        ("[[layers]]\nmatch = '*'\nscheme = 'fp8-dynamic'", "holds one scheme, the others mix"),
        ("scheme = ", "not TOML"),
    ],
)
def test_bad_recipes_name_the_file_and_the_key(tmp_path: Path, text: str, message: str):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        Recipe.from_toml(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_recipe(tmp_path: Path):
    with pytest.raises(UsageError, match="No such file"):
        Recipe.from_toml(tmp_path / "none.toml")


def test_none_is_a_scheme_that_leaves_alone():
    assert scheme_named("none") is None


def test_the_fast_effort_is_optional_until_something_is_named():
    fast = Calibration(effort="fast")
    assert fast.optional
    assert fast.count < Calibration().count
    assert replace(fast, samples=5).count == 5
    named = [replace(fast, data="text.txt"), replace(fast, activations="static"), fast.only(["gptq"]), Calibration()]
    assert not any(calibration.optional for calibration in named)


@pytest.mark.parametrize("given", ["FP8", "fp8-blok", "FP8_Block"])
def test_what_was_meant(given: str) -> None:
    with pytest.raises(UsageError, match=r"known: fp8-block, .*; did you mean 'fp8-block'\?"):
        scheme_named(given)
