"""Calibration from a checkpoint to statistics and rounded weights, over many architectures."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantlab import calibrated, output
from quantlab.checkpoint import ACTIVATION_SCALES
from quantlab.errors import PreflightError, UsageError
from quantlab.lazy import LazyModel
from quantlab.pipeline import quantize
from quantlab.preflight import plan
from quantlab.scheme import Calibration, Recipe
from quantlab.source import Source
from quantlab_calib.capture import capture
from quantlab_calib.search import Feedback

CPU = torch.device("cpu")
TEXT_MODELS = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3", "gemma3_vision", "phi3", "deepseek_v2", "deepseek_v3",
    "bert", "t5",
)  # fmt: skip


@pytest.fixture(scope="session")
def data(text):
    return Calibration(text, samples=16, length=32)


def calibrate(model, calibration, scheme="fp8-block"):
    source = Source.open(model.folder)
    made = plan(source, Recipe(scheme, calibration=calibration))
    return made, calibrated.run(source, made, calibration, CPU)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_every_layer_of_the_text_model_is_seen(with_tokenizer, name, data):
    made, found = calibrate(with_tokenizer(name), data)
    others = ("vision", "multi_modal", "cls.", "pooler")  # not run by text, or after the last block
    shapes = {module: info.shape for d in made.quantized for module, info in d.parts}
    expected = {module for module in shapes if not any(other in module for other in others)}
    assert expected
    assert set(found.inputs) == expected
    for module, seen in found.inputs.items():
        assert seen.amax.shape == seen.energy.shape == (shapes[module][1],)
        assert seen.tokens > 0
    whole = any("as a whole" in note for note in found.notes)
    assert whole == (name == "t5")


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gemma3"])
def test_statistics_are_those_of_the_model_that_transformers_loads(with_tokenizer, name, data):
    model = with_tokenizer(name)
    made, found = calibrate(model, data)
    source = Source.open(model.folder)
    loaded = model.model_class.from_pretrained(model.folder, dtype=torch.float32, experts_implementation="eager")
    lazy = LazyModel(source, CPU, torch.float32)
    batches = calibrated._windows(source, lazy, data, False).split(8)
    names = {module: name for name, modules in calibrated._wanted(lazy, made).items() for module in modules}
    (whole,) = capture(loaded.eval(), batches, Mock(), device=CPU, blocks=None)
    assert found.inputs
    for module, seen in found.inputs.items():
        expected = whole.inputs[names[module]]
        assert seen.tokens == expected.tokens
        torch.testing.assert_close(seen.amax, expected.amax(), rtol=1e-4, atol=1e-6)


def test_experts_have_statistics_of_their_own(with_tokenizer, data):
    _, found = calibrate(with_tokenizer("qwen3_moe"), data)
    experts = [f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(4)]
    tokens = [found.inputs[module].tokens for module in experts]
    assert sum(tokens) == 2 * 16 * 32  # two experts a token
    assert len({tuple(found.inputs[module].energy.tolist()) for module in experts}) == 4


def test_layers_that_saw_too_little_keep_plain_rounding_and_are_named(with_tokenizer, text):
    made, found = calibrate(with_tokenizer("qwen3_moe"), Calibration(text, samples=1, length=40))
    assert any("saw under 128 tokens" in note for note in found.notes)
    assert not found.files
    assert found.rounded(made.quantized[0].module, torch.zeros(made.quantized[0].info.shape)) is None


def test_steps_that_the_scheme_does_not_have_are_noted(with_tokenizer, data):
    for asked in (replace(data, effort="best"), data.only(["gptq"])):
        _, found = calibrate(with_tokenizer("llama"), asked)
        assert found.notes == ["effort and steps are of INT4, fp8-block takes one pass over the original model"]
    assert calibrate(with_tokenizer("llama"), data)[1].notes == []


def test_one_block_is_in_memory_at_a_time(with_tokenizer):
    model = with_tokenizer("llama")
    lazy = LazyModel(Source.open(model.folder), CPU)
    assert all(p.is_meta for p in lazy.model.parameters())
    lazy.load("model.layers.1")
    held = {name for name, p in lazy.model.named_parameters() if not p.is_meta}
    assert held
    assert all(name.startswith("model.layers.1.") for name in held)
    lazy.release("")
    assert all(p.is_meta for p in lazy.model.parameters())


def test_a_lazy_model_loaded_whole_is_the_checkpoint(with_tokenizer):
    for name in ("qwen2", "mixtral", "deepseek_v3"):  # a tied head, fused experts, buffers in float32
        model = with_tokenizer(name)
        lazy = LazyModel(Source.open(model.folder), CPU)
        lazy.load("")
        expected = model.model_class.from_pretrained(model.folder).state_dict()
        found = lazy.model.state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-dynamic"])
def test_rounding_lowers_the_error_of_the_outputs(with_tokenizer, tmp_path, scheme, text):
    model = with_tokenizer("llama")
    calibration = Calibration(text, samples=64, length=32)
    made, found = calibrate(model, calibration, scheme)
    decision = next(d for d in made.quantized if d.tensor.endswith("layers.1.mlp.down_proj.weight"))
    weight = made.source.read(decision.tensor).float()
    ours = found.rounded(decision.module, weight)
    lazy = LazyModel(made.source, CPU, torch.float32)
    batches = calibrated._windows(made.source, lazy, calibration, False).split(16)
    (whole,) = capture(lazy.model, batches, lazy, device=CPU, blocks=None)
    moments = whole.inputs["model.layers.1.mlp.down_proj.weight"].moments()

    def error(values):
        difference = (values.double() - weight).unflatten(1, (-1, 128)).transpose(0, 1)
        return float(((difference @ moments) * difference).sum())

    from quantlab_kernels.qtensor import quantize as plain

    assert error(ours.dequantize()) < 0.9 * error(plain(weight, made.stored.weight).dequantize())


def test_a_calibrated_checkpoint_is_valid_and_differs_only_in_codes(with_tokenizer, tmp_path, data):
    from quantlab.verify import verify

    model = with_tokenizer("llama")
    free = quantize(model.folder, Recipe(), tmp_path / "free", device="cpu", workers=1)
    ours = quantize(model.folder, Recipe(calibration=data), tmp_path / "ours", device="cpu", workers=2)
    again = quantize(model.folder, Recipe(calibration=data), tmp_path / "again", device="cpu", workers=1)
    assert not verify(tmp_path / "ours").problems
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in ("free", "ours", "again"))
    assert {k: (v.dtype, v.shape) for k, v in a.items()} == {k: (v.dtype, v.shape) for k, v in b.items()}
    assert any(not torch.equal(a[k].float(), b[k].float()) for k in a)
    assert all(torch.equal(b[k].float(), c[k].float()) for k in b)
    assert not (tmp_path / "ours" / ACTIVATION_SCALES).exists()
    assert free.calibration == {}
    assert ours.calibration["layers"] == "14 of 14 rounded for their output"
    assert "x the median channel" in ours.calibration["outlier 1"]
    assert json.loads((tmp_path / "ours/quantlab/summary.json").read_text())["calibration"] == ours.calibration
    assert again.bytes_after == ours.bytes_after


@pytest.mark.parametrize(("name", "blocks"), [("llama", 2), ("t5", 1)])
@pytest.mark.parametrize("last", ["calibrating", "model"])
def test_an_interrupted_run_goes_on_behind_the_blocks_that_are_done(
    with_tokenizer, tmp_path, data, monkeypatch, name, blocks, last
):
    """Killed behind the first block, and while shards are written; t5 runs as a whole."""
    model, recipe = with_tokenizer(name), Recipe(calibration=data)
    options = {"device": "cpu", "workers": 1}
    whole = quantize(model.folder, recipe, tmp_path / "whole", **options)

    def stop(label, done, total):
        if label.startswith("calibrating") == (last == "calibrating"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model.folder, recipe, tmp_path / "out", progress=stop, **options)
    observed = []
    of = Feedback.of
    monkeypatch.setattr(Feedback, "of", lambda moments: observed.append(1) or of(moments))
    summary = quantize(model.folder, recipe, tmp_path / "out", **options)
    done = 1 if last == "calibrating" else blocks
    assert summary.calibration.pop("continued") == f"{done} blocks were finished by an earlier run"
    assert summary.calibration == whole.calibration
    assert bool(observed) == (done < blocks)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "out"))
    assert all(torch.equal(before[key].float(), after[key].float()) for key in before)


def test_blocks_that_saw_other_data_are_not_taken_up(with_tokenizer, tmp_path, text, data):
    source = Source.open(with_tokenizer("llama").folder)
    for calibration, resumed in ((data, 0), (data, 2), (replace(data, seed=1), 0)):
        made = plan(source, Recipe(calibration=calibration))
        assert calibrated.run(source, made, calibration, CPU, folder=tmp_path / "kept").resumed == resumed


def test_nothing_is_left_in_the_folder_of_temporary_files(with_tokenizer, tmp_path, data, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    _, found = calibrate(with_tokenizer("llama"), data)
    assert any((tmp_path / "tmp").iterdir())
    del found
    assert not any((tmp_path / "tmp").iterdir())

    def nothing(*_, **__):
        raise AssertionError("a run has a folder")

    monkeypatch.setattr("tempfile.mkdtemp", nothing)
    quantize(with_tokenizer("llama").folder, Recipe(calibration=data), tmp_path / "out", device="cpu", workers=1)


def test_static_activation_scales_lie_in_a_side_file(with_tokenizer, tmp_path, text):
    model = with_tokenizer("llama")
    calibration = Calibration(text, samples=16, length=32, activations="static")
    quantize(model.folder, Recipe(calibration=calibration), tmp_path / "out", device="cpu", workers=1)
    made, found = calibrate(model, calibration)
    with safe_open(tmp_path / "out" / ACTIVATION_SCALES, "pt") as file:
        assert file.metadata()["activations"] == "static"
        assert set(file.keys()) == {d.module for d in made.quantized}
        for decision in made.quantized:
            scale = file.get_tensor(decision.module)
            assert scale.dtype == torch.float32
            torch.testing.assert_close(scale * 448, found.inputs[decision.module].group_amax())


def test_data_and_models_that_do_not_serve(with_tokenizer, tiny, tmp_path, data, text):
    llama = with_tokenizer("llama")
    with pytest.raises(UsageError, match=r"no such file: .*absent.txt"):
        calibrate(llama, Calibration(str(tmp_path / "absent.txt"), length=32))
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(UsageError, match=r"11 tokens found, 496 needed for 16 x 32"):
        calibrate(llama, Calibration(str(tmp_path / "short.txt"), samples=16, length=32))
    with pytest.raises(UsageError, match="static activations have a scale per group of 128; use fp8-block"):
        calibrate(llama, Calibration(text, length=32, activations="static"), "fp8-dynamic")
    with pytest.raises(PreflightError, match="calibration runs text through a model, this one takes pixel_values"):
        calibrate(tiny("vit"), data)


def test_a_model_without_a_tokenizer(tiny, data):
    with pytest.raises(UsageError, match=r"tokenizer.json beside the weights"):
        calibrated._windows(Source.open(tiny("vit").folder), None, data, False)


def test_activations_that_are_not_finite_name_their_layer(with_tokenizer, tmp_path, data):
    model = with_tokenizer("llama")
    tensors = load_file(model.folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][:] = 3e38
    for file in model.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Source.open(tmp_path)
    with pytest.raises(PreflightError, match=r"model.layers.1.self_attn.q_proj.weight: its input is not finite"):
        calibrated.run(source, plan(source, Recipe(calibration=data)), data, CPU)


def test_a_checkpoint_that_lacks_a_tensor(with_tokenizer, tmp_path):
    model = with_tokenizer("llama")
    tensors = load_file(model.folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_bytes((model.folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PreflightError, match=r"the checkpoint has no tensor for model.layers.0.mlp.up_proj.weight"):
        LazyModel(Source.open(tmp_path), CPU).load("model.layers.0")


def test_experts_that_the_checkpoint_holds_fused_are_seen_one_by_one(with_tokenizer, tmp_path, data):
    model = with_tokenizer("qwen3_moe")
    state = model.model_class.from_pretrained(model.folder).state_dict()
    assert state["model.layers.0.mlp.experts.gate_up_proj"].ndim == 3
    for file in model.folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    _, found = calibrate(replace(model, folder=tmp_path), data)
    _, apart = calibrate(model, data)
    assert set(found.inputs) == set(apart.inputs)
    assert all(torch.equal(found.inputs[name].energy, seen.energy) for name, seen in apart.inputs.items())
    assert "model.layers.0.mlp.experts.3.up_proj" in found.inputs


@pytest.mark.parametrize("scheme", ["fp8-block", "int4-fp8"])
def test_the_disk_has_to_hold_what_is_kept(with_tokenizer, tmp_path, monkeypatch, data, scheme):
    folder, recipe = with_tokenizer("llama").folder, Recipe(scheme, calibration=data)
    free = plan(Source.open(folder), recipe).bytes_after + output.SPARE_BYTES + 1000
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: Mock(free=free))
    with pytest.raises(PreflightError, match="out: needs 0"):
        quantize(folder, recipe, tmp_path / "out", device="cpu")
    quantize(folder, replace(recipe, calibration=None), tmp_path / "out", device="cpu")
