"""Shared test settings: what a GPU test needs, and that on a GPU run nothing may skip."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

# Hubs are never asked by a test, and a model that is not on disk fails at once instead of after a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a test that would skip fails instead")


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    needed = marker.kwargs.get("sm", 80)
    present = (
        10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
        if torch.cuda.is_available()
        else 0
    )
    if present < needed:
        found = f"found sm_{present}" if present else "no CUDA device"
        pytest.skip(f"needs sm_{needed}, {found}")


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
