"""Sources that are no good are refused in one line, before any work; good ones keep all their files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantlab.errors import PreflightError, QuantlabError, UsageError
from quantlab.pipeline import quantize
from quantlab.source import Source

Make = Callable[..., Path]


def refused(model: Path | str, kind: type[QuantlabError], message: str) -> None:
    """Opening raises exactly this, and a run leaves nothing in the current folder."""
    before = set(Path.cwd().iterdir())
    with pytest.raises(kind, match=re.escape(message)) as error:
        quantize(model, "fp8-block", device="cpu")
    assert "\n" not in str(error.value)
    assert set(Path.cwd().iterdir()) == before


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "../nowhere", "~/nowhere-at-all"])
def test_no_such_folder(name: str) -> None:
    refused(name, UsageError, f"{name}: no such folder")


def test_a_name_that_is_neither_here_nor_in_the_cache() -> None:
    refused("someone/some-model", UsageError, "someone/some-model: no such folder, not in the local hub cache, and")


def test_a_model_from_the_hub(raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's folder is used as it is, and weights in other formats are not even downloaded."""
    asked = {}

    def snapshot_download(
        name: str, *, revision: str | None, ignore_patterns: list[str], dry_run: bool = False
    ) -> str | list[object]:
        if dry_run:
            return []
        asked[name] = (revision, ignore_patterns)
        return str(folder)

    folder = raw_checkpoint()
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    summary = quantize("someone/some-model", "fp8-block", device="cpu", revision="v2")
    assert summary.output == "some-model-fp8-block"
    revision, ignored = asked["someone/some-model"]
    assert revision == "v2"
    assert {"*.bin", "*.gguf", "original/*"} <= set(ignored)
    refused_revision = pytest.raises(UsageError, match="revision v2 needs a model on the hub, this is a folder")
    with refused_revision:
        quantize(folder, "fp8-block", tmp_path / "out", revision="v2")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("the\nnet"), PreflightError, "someone/m: download failed: RuntimeError: the net"),
        (ValueError("bad name"), UsageError, "someone/m: no such folder or model: ValueError: bad name"),
        (
            OSError(28, "No space left on device"),
            PreflightError,
            "someone/m: download failed: OSError: [Errno 28] No space left",
        ),
    ],
)
def test_downloads_that_fail(
    error: Exception, kind: type[QuantlabError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    refused("someone/m", kind, message)


def test_not_a_model_folder(tmp_path: Path, raw_checkpoint: Make) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", PreflightError, f"{tmp_path / 'empty'}: holds no safetensors file")
    folder = raw_checkpoint()
    refused(folder / "model.safetensors", UsageError, "is a file; give the folder that holds config.json")
    (folder / "config.json").unlink()
    refused(folder, PreflightError, f"{folder}: has no config.json; needs a model folder")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object"), ("", "is not JSON")]
)
def test_config_is_no_config(content: str, message: str, raw_checkpoint: Make) -> None:
    folder = raw_checkpoint()
    (folder / "config.json").write_text(content)
    refused(folder, PreflightError, f"{folder / 'config.json'}: {message}")


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    refused(
        folder, PreflightError, "holds pickled weights only; loading a pickle runs code from it, so they are refused"
    )


def test_gguf_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "m.Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(folder, PreflightError, "holds GGUF files, which are already quantized")
    refused(folder / "m.Q4_K_M.gguf", PreflightError, "GGUF files are already quantized; give the original model")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "a\\b.safetensors"]
)
def test_an_index_that_points_out_of_the_folder(shard: str, raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = shard
    path.write_text(json.dumps(index))
    refused(folder, PreflightError, f"{path}: lm_head.weight: {shard!r} points out of the folder; refused")


@pytest.mark.parametrize("shard", [3, None, "model.bin", ["a"]])
def test_an_index_that_names_no_safetensors_file(shard: object, raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(shards=2)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(folder, PreflightError, f"{path}: a: {shard!r} is not the name of a safetensors file")
    path.write_text('{"metadata": {}}')
    refused(folder, PreflightError, f"{path}: has no weight_map")


def test_index_and_shards_disagree(raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(shards=2)
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())["weight_map"]
    first, second = sorted(set(good.values()))

    def with_map(weight_map: dict[str, str]) -> None:
        path.write_text(json.dumps({"weight_map": weight_map}))

    with_map(good | {"extra.weight": first})
    refused(folder, PreflightError, f"{path}: names extra.weight, which is in no shard")
    name = next(n for n, shard in good.items() if shard == first)
    with_map({n: shard for n, shard in good.items() if n != name})
    refused(folder, PreflightError, f"holds {name}, but model.safetensors.index.json does not name it")
    with_map(good | {name: second})
    refused(folder, PreflightError, f"holds {name}, but model.safetensors.index.json puts it into {second}")
    with_map(good)
    (folder / second).unlink()
    refused(folder, PreflightError, f"{path}: names {second}, which is missing (download it again)")


def test_two_sets_of_weights_in_one_folder(raw_checkpoint: Make) -> None:
    """transformers takes the one file, others what the index names; an index that names the file is no other set."""
    folder = raw_checkpoint(shards=2)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    shards = sorted(folder.glob("model-*.safetensors"))
    shutil.copy(shards[0], single)
    refused(folder, PreflightError, "holds model.safetensors and model.safetensors.index.json, which does not name it")
    shards[0].unlink()
    refused(folder, PreflightError, "remove what is not the model")
    index.write_text(index.read_text().replace(shards[0].name, single.name))
    assert len(Source.open(folder).tensors) == 21


def test_one_name_in_two_shards(raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "model-9.safetensors")
    refused(folder, PreflightError, f"{folder}: duplicate tensor lm_head.weight in model-")


def test_a_truncated_shard(raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(shards=2)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(folder, PreflightError, f"{shard}: ")
    shard.write_bytes(b"")
    refused(folder, PreflightError, f"{shard}: 0 bytes are no safetensors file (download it again)")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq 4"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "fp8 e4m3"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"format": "pack-quantized"}}, "unknown method pack-quantized"),
    ],
)
def test_a_source_that_says_it_is_quantized(config: dict[str, object], said: str, raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(**config)
    refused(folder, PreflightError, f"{folder}: is already quantized ({said}); start from the original model")


def test_a_source_with_weights_in_fp8_but_no_word_of_it(raw_checkpoint: Make) -> None:
    folder = raw_checkpoint({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 128).to(torch.float8_e4m3fn)})
    refused(folder, PreflightError, "is already quantized (model.layers.0.mlp.up_proj.weight is F8_E4M3)")


def test_side_files_are_carried_over_byte_for_byte_and_other_weights_are_not(
    raw_checkpoint: Make, tmp_path: Path
) -> None:
    folder = raw_checkpoint()
    kept = {
        "chat_template.jinja": b"{{ messages }}\r\n", "modeling_custom.py": b"x = 1\n", "processor.json": b"{}",
        "1_Pooling/config.json": b"{}", "2_Dense/model.safetensors": b"whatever", "mtp.safetensors": b"\0\1\2",
        "vocab.bin.txt": b"v",
    }  # fmt: skip
    dropped = [
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "model.fp32-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        ".git/HEAD",
        "onnx/m.onnx",
    ]
    for name, content in kept.items() | {(name, b"no") for name in dropped}:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    summary = quantize(folder, "fp8-block", tmp_path / "out", device="cpu")
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in kept.items())
    assert not any((tmp_path / "out" / name).exists() for name in dropped)
    assert any("model.fp16.safetensors" in warning for warning in summary.warnings)


def test_linked_folders_are_carried_over_and_lost_links_named(raw_checkpoint: Make, tmp_path: Path) -> None:
    folder = raw_checkpoint()
    shared = tmp_path / "shared" / "deep"
    shared.mkdir(parents=True)
    (shared / "config.json").write_text("{}")
    links = {
        "1_Pooling": shared.parent, "nowhere.json": Path("gone"), "itself": Path("itself"), "here": Path("."),
        "around": Path("..", ".."), ".hidden": Path("gone"),
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (shared / "back").symlink_to(folder)
    summary = quantize(folder, "fp8-block", tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "1_Pooling" / "deep" / "config.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    lost = "1_Pooling/deep/back, around, here, itself, nowhere.json"
    assert f"not carried over, links that lead nowhere or back: {lost}" in summary.warnings


def test_opening_reads_no_weight(raw_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = raw_checkpoint(shards=3)
    source = Source.open(folder)
    monkeypatch.setattr(type(source.reader), "read_into", lambda *_: pytest.fail("a weight was read"))
    from quantlab.pipeline import plan

    assert len(plan(folder).decisions) == len(source.tensors) == 21
