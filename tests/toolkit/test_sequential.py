"""INT4 calibration from a checkpoint to a checkpoint: better than plain rounding, continued after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantlab import calibrated, stream
from quantlab.convert import convert
from quantlab.errors import PreflightError, UsageError
from quantlab.pipeline import quantize
from quantlab.scheme import Calibration, Recipe, Rule
from quantlab.sequential import Store, first_row, gathered
from quantlab.verify import verify
from quantlab_calib import data
from quantlab_calib.blockwise import Block, Steps
from quantlab_calib.capture import CaptureError
from quantlab_calib.gptq import Gptq


@pytest.fixture(scope="module")
def calibration(text):
    return Calibration(text, samples=64, length=32)


def logits_of(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


def made(model, folder, calibration, scheme="int4"):
    """Quantize, unpack to 16 bits, and return the summary and the folder that plain transformers loads."""
    summary = quantize(model.folder, Recipe(scheme, calibration=calibration), folder, device="cpu", workers=1)
    assert not verify(folder).problems
    convert(folder, "bf16", folder.with_name(folder.name + "-16"))
    return summary, folder.with_name(folder.name + "-16")


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "phi3", "deepseek_v3"])
def test_the_checkpoint_is_nearer_to_the_original_than_plain_rounding(with_tokenizer, tmp_path, calibration, name):
    model = with_tokenizer(name)
    tokenizer = data.load_tokenizer(model.folder)
    tokens = data.windows(calibration.data, tokenizer, "evaluation", count=8, length=32, seed=7)
    exact = logits_of(model.folder, tokens)
    smooth = replace(calibration, smooth=True)
    _, plain = made(model, tmp_path / "plain", None)
    summary, ours = made(model, tmp_path / "ours", smooth)
    errors = [float((logits_of(folder, tokens) - exact).square().mean()) for folder in (plain, ours)]
    assert errors[1] < 0.9 * errors[0]
    layers, total = summary.calibration["layers"].split(" rounded")[0].split(" of ")
    assert layers == total
    assert ("tokens per expert" in summary.calibration) == (name in ("qwen3_moe", "deepseek_v3"))
    assert "folded into" in summary.calibration["scales"]


def test_an_interrupted_run_goes_on_behind_the_blocks_that_are_done(with_tokenizer, tmp_path, calibration, monkeypatch):
    model = with_tokenizer("llama")
    recipe = Recipe("int4-fp8", calibration=replace(calibration, smooth=True))
    options = {"device": "cpu", "workers": 1}
    quantize(model.folder, recipe, tmp_path / "whole", **options)

    def stop(label, done, total):
        if label == "calibrating model.layers.0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model.folder, recipe, tmp_path / "out", progress=stop, **options)
    rounded = []
    prepare = Gptq.prepare
    monkeypatch.setattr(Gptq, "prepare", lambda self, *given: rounded.append(1) or prepare(self, *given))
    summary = quantize(model.folder, recipe, tmp_path / "out", **options)
    assert len(rounded) == 4  # the stages of the second block
    assert summary.calibration["continued"] == "1 blocks were finished by an earlier run"
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "out" / "quantlab" / "kept").exists()


def test_shards_of_other_calibration_data_are_made_again(with_tokenizer, tmp_path, calibration, text, monkeypatch):
    """Of other contents under the same name: scales that are folded into layers would not fit together."""
    monkeypatch.setattr(stream, "SHARD_BYTES", 100_000)
    model, file, out = with_tokenizer("llama").folder, tmp_path / "data.txt", tmp_path / "out"
    first, second = Path(text).read_text(), Path(text).read_text().upper()
    few = replace(calibration, data=str(file), samples=8, smooth=True)

    def run(contents, folder, until=1.0):
        file.write_text(contents)

        def stop(label, done, total):
            if not label.startswith("calibrating") and done > until * total:
                raise KeyboardInterrupt

        return quantize(model, Recipe("int4", calibration=few), folder, device="cpu", workers=1, progress=stop)

    run(second, tmp_path / "straight")
    for contents in (first, second):
        with pytest.raises(KeyboardInterrupt):
            run(contents, out, until=0.9)
        assert list(tmp_path.glob("out.partial/*.safetensors"))
    assert run(second, out).resumed > 0, "of the second run"
    for shard in (tmp_path / "straight").glob("*.safetensors"):
        assert shard.read_bytes() == (out / shard.name).read_bytes()


def test_a_rotated_checkpoint_is_the_same_model(with_tokenizer, tmp_path, calibration):
    model = with_tokenizer("llama")
    rotated = replace(calibration, samples=8).only(["rotate"])
    recipe = Recipe("int4", (Rule("model.layers.0.*", "none"),), rotated)
    quantize(model.folder, recipe, tmp_path / "turned", device="cpu", workers=1)
    before, after = (load_file(folder / "model.safetensors") for folder in (model.folder, tmp_path / "turned"))
    assert torch.equal(after["model.norm.weight"], torch.ones_like(after["model.norm.weight"]))
    gram = [t["model.embed_tokens.weight"].float() @ t["model.embed_tokens.weight"].float().T for t in (before, after)]
    torch.testing.assert_close(*gram, rtol=0.05, atol=0.02)


def test_rotation_of_tied_embeddings_is_refused(with_tokenizer, tmp_path, calibration):
    recipe = Recipe("int4", calibration=calibration.only(["rotate", "gptq"]))
    with pytest.raises(PreflightError, match=r"cannot be rotated: embeddings are tied to the output layer; .* MB more"):
        quantize(with_tokenizer("qwen2").folder, recipe, tmp_path / "out", device="cpu", workers=1)


def test_blocks_that_run_unless_rotated(with_tokenizer, tmp_path, calibration, monkeypatch):
    """Those of DeepSeek-V4 take a stream of another shape than its embeddings have."""

    def refuse(*_):
        raise CaptureError("RuntimeError: shapes cannot be multiplied")

    monkeypatch.setattr("quantlab_calib.blockwise.rotate_ends", refuse)
    few = replace(calibration, samples=4, effort="best")
    source = with_tokenizer("llama").folder
    found = quantize(source, Recipe("int4", calibration=few), tmp_path / "out", device="cpu", workers=1).calibration
    assert found["note 1"] == "not rotated: RuntimeError: shapes cannot be multiplied"
    with pytest.raises(PreflightError, match="its blocks do not run one by one"):
        quantize(source, Recipe("int4", calibration=few.only(["rotate"])), tmp_path / "b", device="cpu", workers=1)


def test_efforts_and_steps_are_reported(with_tokenizer, tmp_path, calibration):
    few = replace(calibration, samples=16)

    def summary(name, calibration, out):
        recipe = Recipe("int4", calibration=calibration)
        return quantize(with_tokenizer(name).folder, recipe, tmp_path / out, device="cpu", workers=1).calibration

    best = summary("llama", replace(few, effort="best"), "best")
    assert best["steps"] == "best: rotate, gptq, original"
    assert "note 1" not in best
    tied = summary("qwen2", replace(few, effort="best"), "tied")
    assert "not rotated: embeddings are tied" in tied["note 1"]
    tuned = summary("llama", replace(few, tune_steps=4).only(["tune"]), "tuned")
    assert "error of a block's output" in tuned["tuning"]
    fast = summary("llama", replace(few, effort="fast"), "fast")
    assert fast["layers"] == "14 of 14 rounded block by block"
    assert fast["steps"] == "fast: gptq, original"


def test_fast_is_better_than_plain_rounding_and_needs_no_text(with_tokenizer, tmp_path, text):
    model = with_tokenizer("llama")
    tokens = data.windows(text, data.load_tokenizer(model.folder), "evaluation", count=8, length=32, seed=7)
    exact = logits_of(model.folder, tokens)
    errors = []
    for name, calibration in (("plain", None), ("fast", Calibration(effort="fast"))):
        summary, folder = made(model, tmp_path / name, calibration)
        errors.append(float((logits_of(folder, tokens) - exact).square().mean()))
    assert errors[1] < 0.9 * errors[0]
    assert summary.calibration["data"].startswith("bundled: ")
    assert not summary.warnings


def test_fast_rounds_plainly_what_cannot_be_calibrated_and_says_so(with_tokenizer, tmp_path, monkeypatch):
    model = with_tokenizer("llama")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(model.folder / name)
    for name, calibration in (("plain", None), ("fast", Calibration(effort="fast"))):
        recipe = Recipe("int4", calibration=calibration)
        summary = quantize(tmp_path / "model", recipe, tmp_path / name, device="cpu", workers=1)
    (warning,) = summary.warnings
    assert warning.startswith(f"rounded without data: {tmp_path / 'model'}: no tokenizer")
    assert summary.calibration == {}
    plain, fast = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fast"))
    assert all(torch.equal(plain[name], fast[name]) for name in plain)
    monkeypatch.setattr(calibrated, "CPU_WEIGHTS", 1000)
    summary = quantize(
        model.folder, Recipe("int4", calibration=Calibration(effort="fast")), tmp_path / "large", device="cpu"
    )
    assert "calibration of 0.0 billion weights takes long on a CPU" in summary.warnings[0]
    with pytest.raises(UsageError, match="no tokenizer"):
        quantize(tmp_path / "model", Recipe("int4", calibration=Calibration(length=32)), tmp_path / "out", device="cpu")


def test_layers_of_other_schemes_are_named_as_such(with_tokenizer, tmp_path, calibration):
    recipe = Recipe("int4-fp8", (Rule("*.down_proj", "fp8-dynamic"),), replace(calibration, samples=8))
    summary = quantize(with_tokenizer("llama").folder, recipe, tmp_path / "out", device="cpu", workers=1)
    assert summary.calibration["layers"] == "12 of 14 rounded block by block"
    note = "2 layers of other schemes are rounded without data: model.layers.0.mlp.down_proj, ..."
    assert summary.calibration["note 1"] == note


def test_many_experts_without_data_are_one_note():
    few = [f"layers.{i}.down[0]: saw {i} tokens, rounded without data" for i in range(3)]
    assert gathered(["not rotated", *few]) == ["not rotated", *few]
    together = "layers.0.down[0] and 3 others: saw 0 to 9 tokens, rounded without data"
    more = "layers.3.down[0] and 1 that read the same: saw 9 tokens, rounded without data"
    assert gathered([*few, "not rotated", more]) == ["not rotated", together]


def test_blocks_that_were_made_otherwise_do_not_count(tmp_path):
    tokens, other = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    block = Block("layers.3", {"layers.3.w": (torch.ones(2, 16, dtype=torch.int32), torch.ones(2, 1))})
    block.changed["layers.3.norm.weight"] = torch.randn(8).to(torch.bfloat16)
    block.scaled["layers.3.norm"] = (0.5, 0.0)
    block.error, block.tokens, block.notes = (0.5, 0.25), {"layers.3.w": 8}, ["a note"]
    Store(tmp_path, tokens, Steps()).write(block)
    assert Store(tmp_path, other, Steps()).read("layers.3") is None
    assert Store(tmp_path, tokens, Steps(original=False)).read("layers.3") is None
    found = Store(tmp_path, tokens, Steps()).read("layers.3")
    assert torch.equal(found.rounded["layers.3.w"][0], block.rounded["layers.3.w"][0])
    assert torch.equal(found.changed["layers.3.norm.weight"], block.changed["layers.3.norm.weight"])
    assert replace(found, rounded={}, changed={}) == replace(block, rounded={}, changed={})
    (tmp_path / "layers.3.safetensors").write_bytes(b"torn")
    assert Store(tmp_path, tokens, Steps()).read("layers.3") is None


def test_parts_of_a_fused_weight_are_found():
    """By their first row, of which there may be several: dead channels are zeros."""
    weight = torch.randn(6, 8)

    def found(part):
        return first_row(weight, lambda rows: part if rows is None else part[slice(*rows)], len(part))

    assert found(weight[2:6]) == 2
    assert found(weight[:6]) == 0
    assert found(torch.zeros(4, 8)) is None
    weight[[1, 3]] = 0
    assert found(weight[3:6]) == 3
    assert found(weight[1:3]) == 1
    assert found(torch.zeros(2, 8)) is None
    assert found(torch.zeros(7, 8)) is None
