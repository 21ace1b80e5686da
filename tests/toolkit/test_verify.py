"""What is wrong with a checkpoint is found, by name, and what is right passes; foreign checkpoints too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import PreflightError, UsageError, VerificationError
from quantlab.pipeline import quantize
from quantlab.scheme import SCHEMES
from quantlab.verify import verify, verify_weights

Make = Callable[..., Path]
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def checkpoint(raw_checkpoint: Make, tmp_path: Path) -> Path:
    quantize(raw_checkpoint(), "fp8-block", tmp_path / "out", device="cpu")
    return tmp_path / "out"


def change(folder: Path, edit: Change, *, keep_manifest: bool = False) -> Path:
    """Edit tensors and config; without the manifest the checkpoint is as a foreign one."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if not keep_manifest:
        (folder / "quantlab" / "manifest.json").unlink()
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_we_write_is_right(scheme: str, raw_checkpoint: Make, tmp_path: Path) -> None:
    quantize(raw_checkpoint(), scheme, tmp_path / "out", device="cpu")
    result = verify(tmp_path / "out")
    assert result.problems == ()
    assert result.notes == ()
    readers = {check.name.split(":")[0] for check in result.checks if ":" in check.name}
    assert readers == {"all", "compressed-tensors", "transformers", "vLLM", "SGLang"}
    assert all(row[1] == "ok" for row in result.rows())
    assert result.to_dict()["ok"] is True


def test_files_that_changed(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"version": "2.0"}')
    (checkpoint / "quantlab" / "recipe.toml").unlink()
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + " ")
    (checkpoint / "extra.safetensors").write_bytes(b"")
    problems = verify(checkpoint).problems
    assert "tokenizer.json: is not the file that was written (SHA-256 differs)" in problems
    assert "quantlab/recipe.toml: is missing" in problems
    assert "extra.safetensors: is not in the manifest" in problems
    assert any(line.startswith("config.json: has ") and "the manifest says" in line for line in problems)


def test_a_single_flipped_bit_is_found(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    assert verify(checkpoint).problems == ("model.safetensors: is not the file that was written (SHA-256 differs)",)


def drop_scale(tensors: dict[str, torch.Tensor], _: Any) -> None:
    del tensors[f"{Q}.weight_scale_inv"]


def wrong_scale_shape(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[f"{Q}.weight_scale_inv"] = torch.ones(1, 2)


def half_scale(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[f"{Q}.weight_scale_inv"] = tensors[f"{Q}.weight_scale_inv"].bfloat16()


def bad_scales(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[f"{Q}.weight_scale_inv"][0] = torch.tensor([0.0, float("inf")])


def nan_codes(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[f"{Q}.weight"].view(torch.uint8)[3, 4:6] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)


def plain_again(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[f"{Q}.weight"] = torch.zeros(256, 256, dtype=torch.bfloat16)
    del tensors[f"{Q}.weight_scale_inv"]


def scale_of_a_plain_weight(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[f"{Q}.weight"] = torch.zeros(256, 256, dtype=torch.bfloat16)


def skip_head_no_more(_: Any, config: dict[str, Any]) -> None:
    config["modules_to_not_convert"] = []


def skip_a_quantized_one(_: Any, config: dict[str, Any]) -> None:
    config["modules_to_not_convert"] = ["lm_head", "model.layers.0.mlp.gate"]


def skip_by_a_glob(_: Any, config: dict[str, Any]) -> None:
    config["modules_to_not_convert"] = ["lm_head", "*.gate"]


def ragged_rows(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(200, 256).to(torch.float8_e4m3fn)
    tensors["model.layers.0.self_attn.k_proj.weight_scale_inv"] = torch.ones(2, 2)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(200, 256).to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(2, 2)


def quantized_head(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors["lm_head.weight"] = torch.zeros(256, 256).to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale_inv"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (drop_scale, {f"all: {Q}: quantized weight without weight_scale_inv"}),
        (wrong_scale_shape, {f"all: {Q}: scale has shape [1, 2], needs [2, 2]"}),
        (half_scale, {f"all: {Q}: scale is BF16, needs F32"}),
        (bad_scales, {f"scales are positive and finite: {Q}: 2 of 4 scales are not positive and finite"}),
        (nan_codes, {f"codes are numbers: {Q}: 2 codes are NaN"}),
        (
            plain_again,
            {
                f"transformers: {Q}: is a 16-bit linear layer, but the skip list does not name it",
                f"vLLM: {Q}: is a 16-bit layer, but not in the skip list under its full name",
                f"vLLM: {Q}+k_proj+v_proj: fused into one layer, but only some members are quantized",
            },
        ),
        (scale_of_a_plain_weight, {f"all: {Q}: has a scale, but its weight is BF16"}),
        (skip_head_no_more, {"transformers: lm_head: is a 16-bit linear layer, but the skip list does not name it"}),
        (
            skip_a_quantized_one,
            {"transformers: model.layers.0.mlp.gate_proj: is quantized, but the skip list matches it"},
        ),
        (
            skip_by_a_glob,
            {
                "transformers: *.gate: is in the skip list and no regular expression (nothing to repeat at position "
                "3); loading stops there"
            },
        ),
        (
            ragged_rows,
            {
                "SGLang: model.layers.0.mlp.gate_proj+up_proj: up_proj has 200 rows, not a multiple of 128",
                "SGLang: model.layers.0.self_attn.q_proj+k_proj+v_proj: k_proj has 200 rows, not a multiple of 128",
                "vLLM: model.layers.0.self_attn.q_proj+k_proj+v_proj: k_proj has 200 rows, not a multiple of 128",
            },
        ),
        (quantized_head, {"vLLM: lm_head: is quantized; the engine knows no quantized head or embedding"}),
    ],
)
def test_each_fault_is_found_and_named(edit: Change, found: set[str], checkpoint: Path) -> None:
    result = verify(change(checkpoint, edit))
    lines = {f"{check.name.split(':')[0]}: {problem}" for check in result.checks for problem in check.problems}
    assert found <= lines
    if edit not in (scale_of_a_plain_weight, quantized_head):
        assert found == lines
    assert all("\n" not in line for line in result.problems)


def test_names_to_skip_that_are_no_regular_expressions(raw_checkpoint: Make, tmp_path: Path) -> None:
    """compressed-tensors takes them as they are, unless they begin with `re:`."""

    def edit(_: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["ignore"] += ["*.foo*", "re:(", "re:(?i).*LM_HEAD"]

    quantize(raw_checkpoint(), "fp8-dynamic", tmp_path / "out", device="cpu")
    problems = verify(change(tmp_path / "out", edit)).problems
    assert [problem.partition(" (")[0] for problem in problems] == [
        "re:(: is in the skip list and no regular expression"
    ]


def test_ordinary_scales_get_a_note(checkpoint: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor], _: Any) -> None:
        tensors[f"{Q}.weight_scale_inv"] *= 1.1

    result = verify(change(checkpoint, edit))
    assert result.problems == ()
    assert result.notes[0].startswith(f"1 layers (first: {Q}) have scales that are no powers of two")
    assert ("note", result.notes[0]) in result.rows()


def test_dequantizing_576_rows(raw_checkpoint: Make) -> None:
    """DeepSeek's kv_a_proj_with_mqa in FP8: transformers' dequantize=True cannot take its 5 rows of scales apart."""
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": []}
    weight = torch.zeros(576, 256).to(torch.float8_e4m3fn)
    name = "l.kv_a_proj_with_mqa"
    folder = raw_checkpoint(
        {f"{name}.weight": weight, f"{name}.weight_scale_inv": torch.ones(5, 2)}, quantization_config=config
    )
    assert f"{name}: [576, 256] is not divisible by its grid of scales [5, 2]" in verify(folder).problems


def test_what_is_no_quantized_checkpoint(raw_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="is not quantized"):
        verify(raw_checkpoint())
    with pytest.raises(UsageError, match="no such folder"):
        verify(tmp_path / "nowhere")
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    empty = raw_checkpoint({"norm.weight": torch.ones(2)}, name="empty", quantization_config=config)
    assert f"{empty}: holds no quantized weight" in verify_weights(empty)
    (empty / "quantlab").mkdir()
    entry = {"name": "config.json", "bytes": 1, "sha256": ""}
    for wrong in ([], {"files": 3}, {"files": [entry | {"bytes": []}]}, {"files": [entry | {"more": 1}]}):
        (empty / "quantlab" / "manifest.json").write_text(json.dumps(wrong))
        with pytest.raises(PreflightError, match="is not a manifest"):
            verify(empty)


NORM = "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def drop_norm(tensors: dict[str, torch.Tensor], _: Any) -> None:
    del tensors[NORM]


def cut_norm(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[NORM] = tensors[NORM][:100].clone()


def nan_in_norm(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[NORM][7] = torch.nan


def drop_expert(tensors: dict[str, torch.Tensor], _: Any) -> None:
    del tensors[f"{EXPERT}.weight"], tensors[f"{EXPERT}.weight_scale_inv"]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (drop_norm, f"{NORM}: no tensor of the checkpoint goes there"),
        (cut_norm, f"{NORM}: has shape [100], by config.json [128]"),
        (nan_in_norm, f"{NORM}: 1 of 128 values are NaN"),
        (drop_expert, f"{EXPERT}.weight: no tensor of the checkpoint goes there"),
    ],
)
def test_parts_of_the_model_that_are_missing(
    edit: Change, problem: str, quantized: Any, edited: Any, tmp_path: Path
) -> None:
    """They pass every rule for what is there, and `load` makes numbers up in their place or stops."""
    folder = edited(quantized("qwen3_moe", "fp8-block"), tmp_path / "out")
    assert verify(change(folder, edit)).problems == (problem,)


def test_an_expert_that_is_missing_of_a_model_that_transformers_does_not_know(
    quantized: Any, edited: Any, tmp_path: Path
) -> None:
    folder = change(edited(quantized("qwen3_moe", "fp8-block"), tmp_path / "out"), drop_expert)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    assert f"{EXPERT}: is missing, other experts have one" in verify(folder).problems


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "deepseek_v3", "gemma3_vision", "bert", "whisper"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoints_of_known_architectures(name: str, scheme: str, quantized: Callable[[str, str], Any]) -> None:
    assert verify(quantized(name, scheme).folder).problems == ()
