"""What users point the tool at: folders of odd layout, outputs in odd places, objects instead of names."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from typer.testing import CliRunner

import quantlab
from quantlab.cli import app
from quantlab.convert import convert
from quantlab.errors import PreflightError, UsageError, VerificationError
from quantlab.output import write_file
from quantlab.scheme import Calibration
from quantlab.sensitivity import sensitivity
from quantlab.source import Source
from quantlab.summary import sizes
from quantlab_calib.data import DataError, documents, load_tokenizer

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


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
        ({"device_map": "cuda:99"}, "device 'cuda:99': there is no such GPU"),
        ({"baseline": "not opened", "kv": "fp9"}, "unknown KV format 'fp9'"),
        ({"baseline": "not opened", "attention": "int9"}, "unknown attention 'int9'; .*did you mean 'int8'"),
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


def test_a_model_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    quantlab.quantize(MODEL, "fp8-block", "made", device="cpu")
    before = (tmp_path / "made" / "config.json").read_bytes()
    Path("link").symlink_to("made")
    for output in ("made", "link", "../" + tmp_path.name + "/made"):
        with pytest.raises(UsageError, match="the model itself lies there; choose another place with -o"):
            convert("made", "bf16", output, overwrite=True)
    assert (tmp_path / "made" / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_no_name_is_no_model(name: Any):
    calls = quantlab.quantize, quantlab.plan, quantlab.evaluate, quantlab.verify, quantlab.load
    for call in calls:
        with pytest.raises(UsageError, match=r"model is .*; give "):
            call(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"hidden_size": "big"}, r"transformers cannot build this model \(.*hidden_size.*\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"transformers cannot load it \(ImportError"),
    ],
    ids=["a field of another type", "a format whose reader is missing"],
)
def test_what_transformers_does_not_load_is_told_in_a_line(edit: dict[str, Any], message: str, model: Path):
    edit_config(model, **edit)
    with pytest.raises((UsageError, PreflightError), match=message) as error:
        quantlab.evaluate(model, windows=1, length=16, device_map="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", [quantlab.Recipe("int4", calibration=Calibration(effort="fast")), "fp8-dynamic"])
def test_a_config_that_transformers_refuses_is_quantized_by_names(recipe: Any, model: Path, tmp_path: Path):
    edit_config(model, hidden_act="no such function")
    summary = quantlab.quantize(model, recipe, tmp_path / "out", device="cpu")
    told = "transformers cannot build this model (KeyError: 'no such function')"
    assert f"{model}: {told}; layers are told by names and shapes" in summary.warnings
    assert all(told in w for w in summary.warnings if w.startswith("rounded without data"))
    with pytest.raises(PreflightError, match="transformers cannot build this model"):
        quantlab.quantize(model, quantlab.Recipe("fp8-dynamic", kv="fp8"), tmp_path / "kv", device="cpu")


def test_a_config_without_architectures(model: Path):
    edit_config(model, architectures=None)
    assert quantlab.plan(model).architecture == "LlamaModel"


def test_other_formats_are_told_with_the_folder(model: Path, tmp_path: Path):
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    for call in (quantlab.verify, lambda folder: convert(folder, "bf16", tmp_path / "out")):
        with pytest.raises(PreflightError, match=f"{model}: .*does not read; start from the original model"):
            call(model)


def test_nan_in_a_model_is_told_by_sensitivity(model: Path, tmp_path: Path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"not finite, first in model\.layers\.1\.mlp\.up_proj"):
        sensitivity(model, output=tmp_path / "r.json", fast=True, samples=1, length=16, device="cpu")
    assert not (tmp_path / "r.json").exists()


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_file(tmp_path / "a" / "r.json", "first")

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match=r"r.json: cannot be written: No space left on device; give another place"):
        write_file(tmp_path / "a" / "r.json", "second")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["r.json"]
    assert (tmp_path / "a" / "r.json").read_text() == "first"


def test_a_folder_of_no_text_is_no_data(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xff\xfe" * 100)
    (tmp_path / "rows.json").write_text('[{"text": "one"}]')
    for data, message in ((folder, "cannot be loaded"), (tmp_path / "rows.json", "line 1: list, needs an object")):
        with pytest.raises(DataError, match=message):
            list(documents(str(data), "calibration"))
