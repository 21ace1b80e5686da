"""`--format json`: every document has the keys that README.md of the command line names, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantlab.cli import app

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
README = (ROOT / "quantlab" / "cli" / "README.md").read_text(encoding="utf-8")


def documented(command: str) -> set[str]:
    """Keys in the first column of a command's table."""
    section = next(part for part in README.split("\n## ") if command in part.partition("\n")[0].split(", "))
    cells = re.findall(r"^\| (`.*?) \|", section, flags=re.M)
    return {"schema", *(name for cell in cells for name in re.findall(r"`(\w+)`", cell))}


def printed(*arguments: object):
    done = CliRunner().invoke(app, [*map(str, arguments), "--format", "json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


@pytest.fixture(scope="module")
def made(folder):
    return printed("quantize", MODEL, "-o", folder / "made", "--device", "cpu"), folder / "made"


def test_documents_of_checkpoints(made, folder):
    summary, checkpoint = made
    assert set(summary) == documented("quantize")
    assert set(printed("plan", MODEL)) == documented("plan")
    assert set(printed("verify", checkpoint)) == documented("verify")
    assert set(printed("convert", checkpoint, "--to", "bf16", "-o", folder / "bf16")) == documented("convert")


def test_documents_of_measurements(made, folder):
    pytest.importorskip("matplotlib")
    checkpoint = made[1]
    measured = printed("eval", checkpoint, "--baseline", MODEL, "--windows", 2, "--length", 32)
    assert set(measured) == documented("eval")
    assert (measured["schema"], next(iter(measured))) == (1, "schema")
    assert set(printed("compare", checkpoint, checkpoint)) == documented("compare")
    assert set(printed("report", checkpoint)) == documented("report")
    options = ("--fast", "--samples", 1, "--length", 32, "-o", folder / "sensitivity.json")
    assert set(printed("sensitivity", MODEL, *options)) == documented("sensitivity")


def test_a_mixture_is_in_the_document(folder):
    found = printed("quantize", MODEL, "--target-bits", 6, "-o", folder / "mixed", "--device", "cpu")
    assert set(found) == documented("quantize") | {"mixture"}
    assert found["mixture"]["bits"] <= 6
    assert set(found["mixture"]) == {"recipe", "bits", "predicted", "measured", "assigned", "settings"}


def test_lists():
    assert set(printed("explain", 1, 256, 256, "--sm", 90)[0]) == {"room", "backend", "chosen", "reason"}
