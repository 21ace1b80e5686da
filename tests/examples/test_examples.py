"""Every numbered example runs, and shows what its docstring says is to be seen."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert runpy.run_path(str(EXAMPLES / name))["main"](list(arguments)) == 0
    return capsys.readouterr().out


def test_each_has_a_test_and_says_what_is_to_be_seen():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for path in EXAMPLES.glob("[0-9]*.py"):
        assert path.stem.split("_", 1)[1] in tested, f"{path.name} has no test here"
        assert "\nTo be seen: " in path.read_text(encoding="utf-8")


def test_quantize_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    printed = run("01_quantize_and_generate.py", capsys, str(tmp_path))
    assert "'Fp8BlockLinear': 35" in printed
    assert printed.count("'The city of the") == 2
    assert (tmp_path / "tiny-llama-fp8-block" / "model.safetensors").is_file()


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    printed = run("02_evaluate.py", capsys, str(tmp_path))
    assert "fp8-block" in printed
    assert "fp8-dynamic" in printed
    assert "fp8-dynamic beside fp8-block: KL to the baseline (nats) (B - A)" in printed
    page = tmp_path / "tiny-llama-fp8-block" / "quantlab" / "report.html"
    assert f"the report: {page}" in printed
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_write_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    printed = run("03_write_a_recipe.py", capsys, str(tmp_path))
    assert "did you mean 'fp8-block'?" in printed
    kept = (tmp_path / "tiny-llama-my-recipe" / "quantlab" / "recipe.toml").read_text(encoding="utf-8")
    assert kept == (tmp_path / "my-recipe.toml").read_text(encoding="utf-8")


def test_use_an_op(capsys: pytest.CaptureFixture[str]):
    printed = run("04_use_an_op.py", capsys)
    by_group, by_token = map(float, re.findall(r"([\d.]+)%", printed.splitlines()[-1]))
    assert by_token > 2 * by_group


def test_find_sensitive_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    printed = run("05_find_sensitive_layers.py", capsys, str(tmp_path))
    most, least = (float(value) for value in re.findall(r"leaving the \w+ sensitive alone: KL ([\d.]+)", printed))
    assert most < 0.9 * least
    alone, mixed = (float(value) for value in re.findall(r"(?:for all|mixture): KL ([\d.]+)", printed))
    assert mixed < 0.7 * alone


def test_quantize_a_vision_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    printed = run("06_quantize_a_vision_model.py", capsys, str(tmp_path))
    assert printed.count("quantized: fp8-dynamic") == 2
    changes = [float(value) for value in re.findall(r"logits change by ([\d.]+)%", printed)]
    assert len(changes) == 2
    assert all(0 < change < 15 for change in changes)
