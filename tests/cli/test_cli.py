"""The command line: its surface, its speed, and one clear line for every mistake."""

from __future__ import annotations

import importlib
import io
import json
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer
from typer.testing import CliRunner

import quantlab
from quantlab.cli import app, main
from quantlab.errors import UsageError
from quantlab.scheme import SCHEMES, Calibration, Recipe

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
RUN = [sys.executable, "-m", "quantlab.cli"]


def fails(capsys, monkeypatch, *args: str) -> tuple[int, str]:
    """Exit code and stderr of a command that must fail."""
    monkeypatch.setattr(sys, "argv", ["quantlab", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("quantlab.verify"), "verify", interrupt)
    code, said = fails(capsys, monkeypatch, "verify", "x")
    assert code == 130
    assert said.endswith("quantlab: interrupted; the same command continues where it stopped\n")


def test_surface_is_frozen():
    commands = {c.name or c.callback.__name__: c for c in app.registered_commands}
    assert sorted(commands) == [
        "bench",
        "compare",
        "convert",
        "demo",
        "doctor",
        "eval",
        "explain",
        "plan",
        "quantize",
        "report",
        "sensitivity",
        "tune",
        "verify",
    ]


def test_help_names_every_scheme():
    text = CliRunner().invoke(app, ["quantize", "--help"]).output
    assert all(name in text for name in SCHEMES)


@pytest.mark.parametrize("command", typer.main.get_command(app).commands)
def test_help_swallows_nothing(command: str):
    """Brackets are markup to what prints it."""
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).output
    for option in typer.main.get_command(app).commands[command].params:
        said = option.help or ""
        default = getattr(option, "show_default", "")
        assert said in text
        assert not isinstance(default, str) or default in text


def test_help_is_instant():
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*RUN, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    times = [cpu_seconds() for _ in range(5)]
    # 0.3 s is the promise on an idle machine; a busy one takes longer, but little more of the processor's time.
    assert min(times) < 0.5, f"quantlab --help took {statistics.median(times):.2f} s of the processor"
    code = "import quantlab.cli, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_scheme_has_a_suggestion(capsys, monkeypatch, tmp_path: Path):
    code, text = fails(capsys, monkeypatch, "quantize", str(tmp_path), "--scheme", "fp8-blok")
    assert code == 2
    assert "unknown scheme 'fp8-blok'; known: fp8-block, fp8-dynamic, int4, int4-fp8, none; did you" in text
    assert text.endswith("mean 'fp8-block'?\n")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sm", ["80", "90"])
def test_explain_knows_every_scheme(scheme: str, sm: str):
    found = CliRunner().invoke(
        app, ["explain", "16", "4096", "4096", "--scheme", scheme, "--sm", sm, "--format", "json"]
    )
    verdicts = json.loads(found.output)
    rooms = {v["room"] for v in verdicts}
    assert len(rooms) == (1 if scheme == "int4" else 2)
    assert {v["room"] for v in verdicts if v["chosen"]} == rooms


def test_explain_of_a_layer_that_the_scheme_does_not_take(capsys, monkeypatch):
    code, text = fails(capsys, monkeypatch, "explain", "1", "256", "200", "--scheme", "int4", "--sm", "90")
    assert code == 2
    assert "K = 200: int4 has a scale for every 128 of K" in text


def test_scheme_and_recipe_together(capsys, monkeypatch, tmp_path: Path):
    code, text = fails(
        capsys, monkeypatch, "quantize", "m", "--scheme", "fp8-block", "--recipe", str(tmp_path / "r.toml")
    )
    assert code == 2
    assert "give one of the two" in text


def test_static_activations_need_data(capsys, monkeypatch):
    code, text = fails(capsys, monkeypatch, "quantize", "m", "--activations", "static")
    assert code == 2
    assert "--calib" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", ""), "unknown scheme ''"),
        (("--kv", ""), "unknown KV format ''"),
        (("--calib", ""), "data is ''"),
        (("--scheme", "int4", "--steps", ","), "--steps ',' names none; known: rotate,"),
        (("--target-bits", "nan"), "target_bits = nan: must be more than 0"),
    ],
    ids=" ".join,
)
def test_nothing_is_not_the_default(options: tuple[str, ...], message: str, capsys, monkeypatch, tmp_path: Path):
    code, text = fails(capsys, monkeypatch, "quantize", str(MODEL), "-o", str(tmp_path / "out"), *options)
    assert code == 2
    assert message in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["human", "json"])
def test_a_terminal_without_the_letters_of_a_name(format: str, monkeypatch, tmp_path: Path):
    (tmp_path / "größe 模型").symlink_to(MODEL)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["quantlab", "plan", str(tmp_path / "größe 模型"), "--format", format])
    with pytest.raises(SystemExit) as stop:
        main()
    out.flush()
    text = out.buffer.getvalue().decode()
    assert not stop.value.code
    assert "\\u6a21\\u578b" in text
    if format == "json":
        assert json.loads(text)["model"] == str(tmp_path / "größe 模型")


@pytest.mark.parametrize("arguments", [("-h",), ("quantize", "-h")], ids=" ".join)
def test_help_by_its_short_name(arguments: tuple[str, ...]):
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0
    assert "Usage:" in found.output


@pytest.mark.parametrize("command", ["quantize", "plan", "eval"])
def test_no_such_model(command: str, capsys, monkeypatch, tmp_path: Path):
    code, text = fails(capsys, monkeypatch, command, str(tmp_path / "nothing"))
    assert code == 2
    assert text.count("\n") == 1
    assert "nothing" in text


def test_rounding_without_data_takes_none(capsys, monkeypatch):
    code, text = fails(capsys, monkeypatch, "quantize", "m", "--scheme", "int4", "--steps", "rtn", "--calib", "bundled")
    assert code == 2
    assert text == "quantlab: --steps rtn rounds without data; leave out --calib\n"


@pytest.fixture
def recipes(monkeypatch) -> list[Recipe]:
    """Those that `quantlab.quantize` is called with; it does nothing."""
    found = []

    def quantize(model: str, recipe: Recipe, *rest: object, **options: object) -> None:
        found.append(recipe)
        raise UsageError("seen")

    monkeypatch.setattr(quantlab, "quantize", quantize)
    return found


@pytest.mark.parametrize(
    ("options", "calibration"),
    [
        ((), Calibration(effort="fast")),
        (("--calib-samples", "7"), Calibration(effort="fast", samples=7)),
        (("--effort", "best"), Calibration(effort="best")),
        (("--calib", "text.txt"), Calibration("text.txt")),
        (("--steps", "gptq"), Calibration().only(["gptq"])),
        (("--steps", "rtn"), None),
    ],
)
def test_what_int4_is_calibrated_on(options: tuple[str, ...], calibration: Calibration | None, recipes: list[Recipe]):
    CliRunner().invoke(app, ["quantize", "m", "--scheme", "int4-fp8", *options])
    assert recipes == [Recipe("int4-fp8", calibration=calibration)]


KEPT = Calibration("mine.jsonl", samples=512, length=2048, seed=7, smooth=True)


@pytest.mark.parametrize(
    ("options", "calibration"),
    [
        ((), KEPT),
        (("--effort", "best"), replace(KEPT, effort="best")),
        (("--steps", "gptq"), KEPT.only(["gptq"])),
        (("--steps", "rtn"), None),
        (("--calib", "bundled"), replace(KEPT, data="bundled")),
        (("--calib-samples", "9", "--seed", "1"), replace(KEPT, samples=9, seed=1)),
        (("--calib-length", "512"), replace(KEPT, length=512)),
        (("--activations", "static"), replace(KEPT, activations="static")),
    ],
    ids=str,
)
def test_options_replace_only_what_they_name_of_a_recipe(
    options: tuple[str, ...], calibration: Calibration | None, recipes: list[Recipe], tmp_path: Path
):
    recipe = Recipe("int4", calibration=KEPT)
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    CliRunner().invoke(app, ["quantize", "m", "--recipe", str(tmp_path / "r.toml"), *options])
    assert recipes == [replace(recipe, calibration=calibration)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--calib-samples", "9"), "--calib-samples: nothing is calibrated without data; add --calib bundled, or"),
        (("--seed", "1", "--activations", "static"), "--seed, --activations: nothing is calibrated without data; add"),
        (("--scheme", "int4", "--steps", "rtn", "--seed", "1"), "--steps rtn rounds without data; leave out --seed"),
        (("--target-bits", "5", "--calib", "bundled", "--seed", "1"), "leave out; add --effort or --steps"),
        (("--mix", "int4"), "--mix int4: schemes are chosen for a size or a loss; add --target-bits or --max-kl"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(options: tuple[str, ...], said: str, capsys, monkeypatch):
    code, text = fails(capsys, monkeypatch, "quantize", "m", *options)
    assert code == 2
    assert said in text


@pytest.mark.parametrize("option", ["--dry-run", "--unchecked", "--sustained=1"])
def test_whole_jobs_take_no_options_of_rooms(option: str, capsys, monkeypatch):
    code, text = fails(capsys, monkeypatch, "bench", "generation", option)
    assert code == 2
    assert "are for rooms of kernels, generation is a whole job; leave them out" in text


@pytest.mark.parametrize(
    ("room", "options", "said"),
    [
        ("moe", ("--scheme", "int4", "--kv", "fp8"), "moe takes no --kv, --scheme; leave out"),
        ("gemm_fp8_block", ("--dry-run", "--shape", "tiny"), "gemm_fp8_block takes no --shape; leave out"),
        ("conversion", ("--shape", "tiny", "--attention", "int8"), "conversion takes no --attention; leave out"),
        ("conversion", ("--case", "one"), "conversion takes no --case; leave out"),
    ],
)
def test_options_of_other_benchmarks_are_refused(room: str, options: tuple[str, ...], said: str, capsys, monkeypatch):
    code, text = fails(capsys, monkeypatch, "bench", room, *options)
    assert code == 2
    assert said in text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_is_one_line(error: BaseException, capsys, monkeypatch):
    monkeypatch.setattr("quantlab.cli.app", mock.Mock(side_effect=error))
    code, text = fails(capsys, monkeypatch, "plan", "m")
    assert code == 1
    assert text.count("\n") == 1
    assert text.startswith("quantlab: out of memory; take shorter or fewer pieces of data, or another device (")


def test_other_errors_of_torch_are_not_hidden(monkeypatch):
    monkeypatch.setattr("quantlab.cli.app", mock.Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main()
