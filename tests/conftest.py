"""Shared test settings: what a GPU test needs, and that on a GPU run nothing may skip."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Hubs are never asked by a test, and a model that is not on disk fails at once instead of after a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# A machine that is busy with something else is no failure: neither an example nor making one has to be quick.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a test that would skip fails instead")


def pytest_runtest_setup(item: pytest.Item) -> None:
    one, several = item.get_closest_marker("gpu"), item.get_closest_marker("gpus")
    if several:
        _need(90, several.args[0])
    elif one:
        _need(one.kwargs.get("sm", 80), 1)


def _need(sm: int, count: int) -> None:
    """The first GPUs, so many, are the ones that tests use."""
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    present = [10 * major + minor for major, minor in found]
    if len(present) < count or min(present[:count]) < sm:
        names = " and ".join(f"sm_{each}" for each in present) or "no CUDA device"
        pytest.skip(f"needs {f'{count} of ' if count > 1 else ''}sm_{sm}, found {names}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--require-gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped under --require-gpu: {report.longrepr}"


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def interpreted(tmp_path: Path) -> Callable[[str], str]:
    """Runs a program with Triton's interpreter and returns what it prints; a program that fails fails the test.

    The interpreter is chosen when triton is imported, hence a process of its own. Tests of `ops` can be imported there.
    """
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    search = os.pathsep.join(str(root / part) for part in ("tests/ops", ".", "kernels", "calib"))

    def run(program: str) -> str:
        path = tmp_path / "interpreted.py"  # Triton reads the source of kernels that the program defines
        path.write_text(program)
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
        if "_new_range" in done.stderr and "only 0-dimensional arrays" in done.stderr:
            pytest.xfail("the interpreter of Triton 3.6 cannot run loops of computed length with NumPy 2.4")
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def character_tokenizer() -> Callable[..., Any]:
    """A tokenizer with a token per printable character, 98 in all; BOS in front and a chat template if asked for."""

    def make(*, bos: bool = False, chat_template: str | None = None) -> Any:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        characters = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 126))]
        model = models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" ")
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
        tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": " "}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)

    return make
