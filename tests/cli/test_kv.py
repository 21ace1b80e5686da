"""`--kv` on the embedded model, as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantlab.cli import app, main

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_cache_is_measured_kept_checked_and_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import quantlab
    from quantlab import cache
    from quantlab_calib import rope

    command = ("quantize", MODEL, "--scheme", "fp8-dynamic", "--kv", "fp8", "-o", tmp_path / "out", "--device", "cpu")
    text = run(*command)
    assert "5 layers measured all over the context, and the scales of its FP8 cache" in " ".join(text.split())
    found = json.loads(run("verify", tmp_path / "out", "--format", "json"))
    assert found["ok"]
    assert "key statistics are of these weights" in [check["name"] for check in found["checks"]]
    summary = json.loads(run("convert", tmp_path / "out", "--to", "bf16", "-o", tmp_path / "bf16", "--format", "json"))
    assert summary["warnings"] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]

    monkeypatch.setattr(rope, "key_statistics", None)  # nothing measures from here on
    assert cache.prepared(quantlab.load(tmp_path / "out")).kv.format == "fp8"
    assert cache.prepared(quantlab.load(tmp_path / "bf16", kv="int4")).kv.format == "int4"
    options = ("--windows", 1, "--length", 32, "--kv", "int4", "--format", "json")
    assert json.loads(run("eval", tmp_path / "out", *options))["settings"]["kv"] == "int4"


def test_warnings_of_ours_are_a_line():
    import quantlab.cli
    from quantlab.keys import StaleKeysWarning

    said = quantlab.cli._warning("of other weights", StaleKeysWarning, "/where/file.py", 7, "x = 1")
    assert said == "quantlab: warning: of other weights\n"
    assert "file.py:7: UserWarning: theirs" in quantlab.cli._warning("theirs", UserWarning, "/where/file.py", 7, "x")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("quantize", MODEL, "--kv", "int5"), 2, "unknown KV format 'int5'; known: 16bit, fp8, int4, int8, k8v4, none"),
        (("quantize", MODEL, "--scheme", "none", "--kv", "int8"), 2, "quantlab.load(MODEL, kv='int8')"),
        (("eval", MODEL, "--kv", "int5"), 2, "unknown KV format 'int5'"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[object, ...], code: int, message: str, capsys, monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quantlab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    text = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == code
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())
