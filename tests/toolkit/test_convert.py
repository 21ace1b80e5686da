"""From one format to the other and back is the identity, bf16 is the dequantized model, and others read it so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from quantlab import hf
from quantlab.checkpoint import stored_in
from quantlab.convert import convert
from quantlab.errors import PreflightError, QuantlabError, UsageError
from quantlab.pipeline import quantize
from quantlab.scheme import SCHEMES, Recipe, Rule
from quantlab.verify import verify
from quantlab_kernels.packing import unpack_int4
from quantlab_kernels.qtensor import QuantizedTensor

Make = Callable[..., Path]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def block(raw_checkpoint: Make, tmp_path: Path) -> Path:
    quantize(raw_checkpoint(shards=2), "fp8-block", tmp_path / "block", device="cpu")
    return tmp_path / "block"


def test_there_and_back_is_the_identity(block: Path, tmp_path: Path) -> None:
    convert(block, "compressed-tensors", tmp_path / "ct")
    convert(tmp_path / "ct", "fp8", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (block / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "config.json").read_bytes() == (block / "config.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (block / "tokenizer.json").read_bytes()
    assert verify(tmp_path / "ct").problems == ()
    assert verify(tmp_path / "back").problems == ()


def test_the_compressed_tensors_form(block: Path, tmp_path: Path) -> None:
    convert(block, "compressed-tensors", tmp_path / "ct")
    config = config_of(tmp_path / "ct")["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "float-quantized")
    assert config["config_groups"]["group_0"]["weights"]["block_structure"] == [128, 128]
    assert config["ignore"] == config_of(block)["quantization_config"]["modules_to_not_convert"]
    before, after = tensors_of(block), tensors_of(tmp_path / "ct")
    assert {name.replace("weight_scale_inv", "weight_scale") for name in before} == after.keys()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16_is_the_dequantized_model(scheme: str, raw_checkpoint: Make, tmp_path: Path) -> None:
    source = raw_checkpoint()
    quantize(source, scheme, tmp_path / "q", device="cpu")
    summary = convert(tmp_path / "q", "bf16", tmp_path / "bf16")
    codes, values = tensors_of(tmp_path / "q"), tensors_of(tmp_path / "bf16")
    suffix = "_scale_inv" if scheme == "fp8-block" else "_scale"
    for name in [name for name in codes if name.endswith("weight_packed")]:
        shape = codes.pop(name.replace("_packed", "_shape")).tolist()
        codes[name.removesuffix("_packed")] = unpack_int4(codes.pop(name), shape[1])
    assert values.keys() == tensors_of(source).keys()
    for name, value in values.items():
        if name + suffix in codes:
            quantized = QuantizedTensor(codes[name], codes[name + suffix].float(), SCHEMES[scheme].weight)
            assert torch.equal(value, quantized.dequantize(torch.bfloat16)), name
        else:
            assert torch.equal(value, codes[name]), name
    assert "quantization_config" not in config_of(tmp_path / "bf16")
    assert summary.groups["multiplied out"][0] == 14
    assert summary.bytes_after > summary.bytes_before


def test_quantizing_it_again_gives_the_same_codes(block: Path, tmp_path: Path) -> None:
    """The dequantized values lie on the grid: nothing is rounded a second time."""
    convert(block, "bf16", tmp_path / "bf16")
    quantize(tmp_path / "bf16", "fp8-block", tmp_path / "again", device="cpu")
    before, after = tensors_of(block), tensors_of(tmp_path / "again")
    for name, codes in before.items():
        if name + "_scale_inv" in before:
            first, second = (
                QuantizedTensor(t[name], t[name + "_scale_inv"], SCHEMES["fp8-block"].weight).dequantize()
                for t in (before, after)
            )
            assert torch.equal(first, second), name
        else:
            assert torch.equal(codes, after[name])


SCALE = "model.layers.0.self_attn.k_proj.weight_scale_inv"


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[SCALE.removesuffix("_inv")] = tensors.pop(SCALE)


def of_other_blocks(tensors: dict[str, torch.Tensor]) -> None:
    tensors[SCALE] = tensors[SCALE].repeat_interleave(2, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(SCALE), r"k_proj\.weight holds codes, but there is no scale of it"),
        (renamed, r"k_proj\.weight holds codes, but there is no scale of it"),
        (of_other_blocks, r"k_proj\.weight_scale_inv is \[\d, \d\], needs \[1, \d\]"),
    ],
)
def test_codes_without_their_scale_are_no_weights(
    damage: Any, message: str, quantized: Any, edited: Any, tmp_path: Path
) -> None:
    folder = edited(quantized("llama", "fp8-block"), tmp_path / "in")
    tensors = tensors_of(folder)
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=message):
        convert(folder, "bf16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["bf16", "int4-fp8"])
def test_an_order_of_columns_is_not_left_out(to: str, quantized: Any, edited: Any, tmp_path: Path) -> None:
    """In a checkpoint whose config does not name it."""
    folder = edited(quantized("llama", "int4"), tmp_path / "in")
    tensors = tensors_of(folder)
    tensors["model.layers.0.self_attn.k_proj.weight_g_idx"] = torch.zeros(256, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert any("k_proj: has weight_g_idx" in problem for problem in verify(folder).problems)
    with pytest.raises(UsageError, match="weight_g_idx"):
        convert(folder, to, tmp_path / "out")
    with pytest.raises(QuantlabError):
        hf.load(folder)


def test_experts_in_one_weight_keep_its_name(raw_checkpoint: Make, tmp_path: Path) -> None:
    """As GraniteMoE has them: `input_linear.weight`, which is no parameter of the experts' module."""
    name, config = "l.input_linear.weight", {"quant_method": "fp8", "weight_block_size": [128, 128]}
    codes, scale = torch.randn(2, 128, 256).to(torch.float8_e4m3fn), torch.rand(2, 1, 2)
    folder = raw_checkpoint({name: codes, f"{name}_scale_inv": scale}, quantization_config=config)
    convert(folder, "bf16", tmp_path / "out")
    values = codes.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == {name}
    assert torch.equal(found[name], values.bfloat16())


def test_rotated_activations_are_not_lost(quantized: Any, edited: Any, tmp_path: Path) -> None:
    """With a transform_config the weights alone are not the model."""
    transforms = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
    folder = edited(quantized("llama", "fp8-dynamic"), tmp_path / "in", transform_config=transforms)
    with pytest.raises(PreflightError, match="is a format that quantlab does not read"):
        convert(folder, "bf16", tmp_path / "out")
    with pytest.raises(QuantlabError):
        hf.load(folder)


def test_without_a_skip_list_the_head_is_skipped(quantized, edited, tmp_path: Path) -> None:
    """As in DeepSeek's releases; compressed-tensors has no such default."""
    folder = edited(quantized("llama", "fp8-block"), tmp_path / "in", modules_to_not_convert=None)
    (folder / "quantlab" / "manifest.json").unlink()
    assert verify(folder).problems == ()
    convert(folder, "compressed-tensors", tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == ["lm_head"]


def test_what_cannot_be_converted(block: Path, raw_checkpoint: Make, tmp_path: Path) -> None:
    def refused(folder: Path, to: str, message: str) -> None:
        with pytest.raises(UsageError, match=re.escape(message)):
            convert(folder, to, tmp_path / "no")
        assert not (tmp_path / "no").exists()

    refused(block, "fp8", f"{block}: is already in the format fp8")
    refused(block, "gguf", "unknown format 'gguf'; known: bf16, compressed-tensors, fp8")
    refused(block, "bf61", "did you mean 'bf16'?")
    quantize(tmp_path / "model", "fp8-dynamic", tmp_path / "row", device="cpu")
    refused(tmp_path / "row", "fp8", "has a scale per row; the format fp8 holds blocks, so keep compressed-tensors")
    refused(tmp_path / "model", "bf16", "is not quantized; `quantlab quantize` makes quantized checkpoints")
    with pytest.raises(UsageError, match="exists"):
        convert(block, "bf16", tmp_path / "row")


def test_bfloat16_block_scales_of_others_are_widened(block: Path, tmp_path: Path) -> None:
    """llm-compressor writes block scales in the model's dtype; the fp8 format wants F32."""
    from safetensors.torch import save_file

    convert(block, "compressed-tensors", tmp_path / "ct")
    tensors = tensors_of(tmp_path / "ct")
    halved = {n: t.bfloat16() if n.endswith("weight_scale") else t for n, t in tensors.items()}
    save_file(halved, tmp_path / "ct" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "ct", "fp8", tmp_path / "fp8")
    before, after = tensors_of(block), tensors_of(tmp_path / "fp8")
    assert all(torch.equal(tensor.float(), after[name].float()) for name, tensor in before.items())
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())


@pytest.mark.parametrize("form", ["fp8-dynamic", "block", "int4", "int4-fp8"])
def test_compressed_tensors_decompresses_to_our_values(
    form: str, quantized: Callable[[str, str], Any], tmp_path: Path
) -> None:
    """Their library as the oracle: the weights it makes of a checkpoint are those of `convert --to bf16`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    from quantlab.checkpoint import quantization_config

    if form == "block" and Version(version("compressed-tensors")) < Version("0.19"):
        pytest.skip("compressed-tensors before 0.19 takes one column of blocks for channels")
    folder = quantized("llama", "fp8-block" if form == "block" else form).folder
    if form == "block":
        convert(folder, "compressed-tensors", tmp_path / "ct")
        folder = tmp_path / "ct"
    convert(folder, "bf16", tmp_path / "bf16")
    stored = stored_in(config_of(folder))
    assert stored is not None
    scheme = QuantizationConfig.model_validate(quantization_config(stored)).config_groups["group_0"]
    compressor = BaseCompressor.load_from_registry(stored.layout)
    tensors, values = tensors_of(folder), tensors_of(tmp_path / "bf16")
    checked = 0
    for name, tensor in tensors.items():
        name = name.removesuffix("_packed")
        if name + "_scale" not in tensors:
            continue
        parts = {"weight": tensor} if name in tensors else {"weight_packed": tensor}
        parts |= {"weight_shape": tensors[name + "_shape"]} if name + "_shape" in tensors else {}
        theirs = compressor.decompress(parts | {"weight_scale": tensors[name + "_scale"].bfloat16()}, scheme)
        assert torch.equal(theirs["weight"].bfloat16(), values[name]), name
        checked += 1
    assert checked == 14


def test_activations_of_int4_weights_flip(quantized: Callable[[str, str], Any], tmp_path: Path) -> None:
    source, other = (quantized("llama", scheme).folder for scheme in ("int4", "int4-fp8"))
    convert(source, "int4-fp8", tmp_path / "flipped")
    convert(tmp_path / "flipped", "int4", tmp_path / "back")
    for made, wanted in (("flipped", other), ("back", source)):
        assert config_of(tmp_path / made)["quantization_config"] == config_of(wanted)["quantization_config"]
        before, after = tensors_of(wanted), tensors_of(tmp_path / made)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert verify(tmp_path / made).problems == ()
    for folder, to, message in (
        (source, "int4", "already in the format"),
        (source, "fp8", "they go to int4, int4-fp8 or bf16"),
        (quantized("llama", "fp8-dynamic").folder, "int4", "holds no INT4 weights"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(folder, to, tmp_path / "no")


def test_kinds_may_mix(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """INT4 for most, FP8 for the others, 16 bits for one: on disk, multiplied out, flipped."""
    rules = Rule("*.down_proj", "fp8-dynamic"), Rule("model.layers.0.self_attn.*", "none")
    quantize(tiny("llama").folder, Recipe("int4-fp8", rules), tmp_path / "mixed", device="cpu")
    assert verify(tmp_path / "mixed").problems == ()
    config = config_of(tmp_path / "mixed")["quantization_config"]
    assert config["format"] == "mixed-precision"
    names = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"], names]
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "float-quantized"]
    stored = stored_in(config_of(tmp_path / "mixed"))
    assert stored is not None
    assert [stored.kind(name).scheme for name in (names[0], "model.layers.1.mlp.up_proj")] == [
        "fp8-dynamic",
        "int4-fp8",
    ]

    convert(tmp_path / "mixed", "int4", tmp_path / "int4")
    convert(tmp_path / "mixed", "bf16", tmp_path / "bf16")
    model, plain = (hf.load(tmp_path / name, dtype=torch.float32) for name in ("int4", "bf16"))
    layer = model.model.layers[1]
    assert [type(m).__name__ for m in (layer.mlp.down_proj, layer.mlp.up_proj)] == ["Fp8RowLinear", "Int4Linear"]
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = model(tokens).logits, plain(tokens).logits
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.05
    hf.load(tmp_path / "int4").save_pretrained(tmp_path / "saved")
    before, after = tensors_of(tmp_path / "int4"), tensors_of(tmp_path / "saved")
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_the_recipe_comes_along(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    recipe = Recipe("int4", (Rule("*.down_proj", "fp8-dynamic"), Rule("*.0.*.o_proj", "int4")), kv="int8")
    quantize(tiny("llama").folder, recipe, tmp_path / "int4", device="cpu")
    convert(tmp_path / "int4", "int4-fp8", tmp_path / "flipped")
    flipped = Recipe.from_toml(tmp_path / "flipped" / "quantlab" / "recipe.toml")
    assert flipped == Recipe("int4-fp8", (recipe.rules[0], Rule("*.0.*.o_proj", "int4-fp8")), kv="int8")
    assert hf.load(tmp_path / "flipped").quantlab_kv.kv.format == "int8"
    convert(tmp_path / "flipped", "bf16", tmp_path / "bf16")
    assert not (tmp_path / "bf16" / "quantlab" / "recipe.toml").exists()
