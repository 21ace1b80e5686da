"""What users point the tool at: folders of odd layout, outputs in odd places, objects instead of names."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from typer.testing import CliRunner

import quantlab
from quantlab.checkpoint import Source
from quantlab.cli import app
from quantlab.errors import PreflightError, UsageError
from quantlab.scheme import Calibration
from quantlab.summary import sizes
from quantlab_calib.data import DataError, load_tokenizer

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def hub_cache(root: Path) -> Path:
    """The layout of the hub's cache: snapshots of links into a folder of blobs."""
    repository = root / "models--acme--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(MODEL.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_links_and_names_beyond_ascii(tmp_path: Path):
    outputs = [tmp_path / "größe 模型" / "a b", tmp_path / "plain"]
    link = tmp_path / "link"
    link.symlink_to(MODEL)
    for source, output in zip((link, hub_cache(tmp_path)), outputs, strict=True):
        quantlab.quantize(source, "fp8-block", output, device="cpu")
        assert not quantlab.verify(output).problems
        assert not any(path.is_symlink() for path in output.rglob("*"))
    assert len({(output / "model.safetensors").read_bytes() for output in outputs}) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: hub_cache(path).parents[1], "holds no safetensors file; did you mean .*snapshots/a{40}[?]"),
        (lambda path: path / "adapter", "is an adapter [(]LoRA[)]; merge it"),
    ],
    ids=["the root of a hub cache", "an adapter"],
)
def test_near_misses_are_told_what_to_give(make, message: str, tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.zeros(8, 8)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(PreflightError, match=message):
        quantlab.quantize(make(tmp_path), "fp8-block", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_model_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(model)
    for output in (None, "sub", model / "deep" / "sub"):
        with pytest.raises(UsageError, match="lies in the model's own folder; choose another place with -o"):
            quantlab.quantize(".", "fp8-block", output)
    assert sorted(path.name for path in model.iterdir()) == sorted(path.name for path in MODEL.iterdir())


def test_objects_instead_of_names(tmp_path: Path):
    with pytest.raises(UsageError, match="model is a Linear; give the folder or the hub id"):
        quantlab.quantize(torch.nn.Linear(2, 2), "fp8-block", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="recipe is a dict; give a Recipe, the name of a scheme or a TOML file"):
        quantlab.plan(MODEL, {"scheme": "fp8-block"})  # type: ignore[arg-type]


def test_a_recipe_may_be_a_file(tmp_path: Path):
    recipe = quantlab.Recipe("fp8-dynamic")
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert quantlab.plan(MODEL, file).recipe == quantlab.plan(MODEL, str(file)).recipe == recipe
    with pytest.raises(UsageError, match=r"nosuch\.toml: No such file"):
        quantlab.plan(MODEL, Path("nosuch.toml"))


def test_a_bare_parameter_does_not_skip_the_block_it_is_in(model: Path, tmp_path: Path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.queries"] = torch.zeros(8, 256, dtype=torch.bfloat16)
    tensors["model.table"] = torch.zeros(128, 128, dtype=torch.float64)
    save_file(tensors, model / "model.safetensors")
    summary = quantlab.quantize(model, "fp8-block", tmp_path / "out")
    assert summary.groups["quantized: fp8-block"][0] == 35
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


def test_sizes_say_which_way():
    assert sizes(1000, 500) == "1.0 kB -> 500 B (2.00x smaller)"
    assert sizes(500, 1000) == "500 B -> 1.0 kB (2.00x as large)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 5000}, "windows of 5000 tokens: .* has a context of 1024; give --length 1024"),
        ({"device_map": "gpu"}, "device map 'gpu'; known: auto, .*cuda:N"),
    ],
    ids=str,
)
def test_evaluations_that_cannot_be(options: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        quantlab.evaluate(MODEL, windows=1, **options)


def test_a_missing_harness_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(Source, "open", lambda *_: pytest.fail("work began"))
    with pytest.raises(UsageError, match=r"--tasks needs lm-eval; install it with: pip install"):
        quantlab.evaluate(MODEL, tasks=["hellaswag"])


def test_calibration_stays_within_the_context(tmp_path: Path):
    recipe = quantlab.Recipe(calibration=Calibration(length=2000, samples=1))
    with pytest.raises(UsageError, match=r"2000 tokens a sequence: .* has a context of 1024; give --calib-length 1024"):
        quantlab.quantize(MODEL, recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_vocabulary_is_none(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match=r"its tokenizer has no vocabulary; put tokenizer\.json beside the weights"):
        load_tokenizer(tmp_path)


def test_the_command_tells_its_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("quantlab")


def test_the_head_of_a_speech_model_stays(tmp_path: Path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (128,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embedding_groups": 4}
    config = Wav2Vec2Config(vocab_size=32, num_conv_pos_embeddings=16, **sizes, **convolutions)
    Wav2Vec2ForCTC(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    summary = quantlab.quantize(tmp_path / "model", "fp8-dynamic", tmp_path / "out", device="cpu")
    assert any(reason.startswith("output head") for reason in summary.groups)
