"""The embedded model and the bundled text are what everything offline takes them for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
TEXT = ROOT / "calib" / "quantlab_calib" / "text"


def documents(name: str) -> set[str]:
    return set((TEXT / name).read_text(encoding="utf-8").strip().split("\n\n\n"))


def test_every_linear_layer_is_whole_blocks():
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a dict
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert len(matrices) == 36
    assert all(size % 128 == 0 for shape in matrices.values() for size in shape)
    assert (MODEL / "model.safetensors").stat().st_size < 12 * 10**6


def test_texts_share_no_document():
    calibration, evaluation = documents("calibration.txt"), documents("evaluation.txt")
    assert len(calibration) == 311
    assert len(evaluation) == 304
    assert not calibration & evaluation


def test_licence_travels_with_the_text():
    notice = (TEXT / "NOTICE.md").read_text(encoding="utf-8")
    assert "creativecommons.org/licenses/by-sa/4.0" in notice
    assert "Wikipedia" in notice


def test_tokenizer_is_lossless_and_begins_with_bos():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "Ærø, 1998:\n\n\n  two  spaces, ключ, 東京."
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@torch.inference_mode()
def test_perplexity_is_far_from_uniform():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = tokenizer((TEXT / "evaluation.txt").read_text(encoding="utf-8")[:4000], return_tensors="pt")["input_ids"]
    loss = model(tokens, labels=tokens).loss.item()
    # The whole text gives 21.15; this piece of it has an error of its own, and 4096 would be uniform.
    card = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))["perplexity"]["evaluation"]
    assert math.exp(loss) == pytest.approx(card, rel=0.35)
