"""What is taken from a checkpoint and what is handed to transformers; what saving gives back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantlab
from quantlab import hf
from quantlab.convert import convert
from quantlab.errors import UsageError
from quantlab.experts import Experts, Fp8BlockExperts
from quantlab.int4_experts import Int4Fp8Experts
from quantlab.int4_linear import Int4Fp8Linear, Int4Linear
from quantlab.linear import Fp8BlockLinear, Fp8Linear, Fp8RowLinear
from quantlab.verify import verify


@pytest.fixture(autouse=True)
def ours():
    hf.enable()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation_scheme": "static"}, "activation_scheme = 'static'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\]"),
    ],
    ids=str,
)
def test_foreign_fp8_is_handed_over_with_a_reason(quantized, change: dict, reason: str):
    from transformers.quantizers.auto import AutoHfQuantizer

    config = json.loads((quantized("llama", "fp8-block").folder / "config.json").read_text())["quantization_config"]
    quantizer = AutoHfQuantizer.from_config(config | change)
    assert quantizer.reason is not None
    assert re.search(reason, quantizer.reason)


def test_dequantize_true_is_handed_over(quantized):
    from transformers import FineGrainedFP8Config

    source = quantized("llama", "fp8-block")
    model = source.model_class.from_pretrained(source.folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_quantizing_while_loading_is_handed_over(tiny):
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(FineGrainedFP8Config(), pre_quantized=False)
    assert quantizer.reason == "it is quantized while loading"


def ct_group(weights: dict, inputs: dict | None) -> dict:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": common | {"dynamic": False} | weights,
            "input_activations": None if inputs is None else common | {"dynamic": True} | inputs,
        }},
    }  # fmt: skip


def int4_group(size: int, inputs: dict | None, **changes: object) -> dict:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size} | changes
    return ct_group(weights, inputs) | {"format": "pack-quantized"}


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (ct_group({"strategy": "channel"}, {"strategy": "token"}), Fp8RowLinear),
        (
            ct_group({"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 128}),
            Fp8BlockLinear,
        ),
        (int4_group(128, None), Int4Linear),
        (int4_group(128, {"strategy": "token"}), Int4Fp8Linear),
        (int4_group(32, None), None),
        (int4_group(128, None, symmetric=False), None),
        (int4_group(128, None, actorder="group"), None),
        (int4_group(128, {"strategy": "token", "type": "int"}), None),
        (ct_group({"strategy": "tensor"}, {"strategy": "token"}), None),
        (ct_group({"strategy": "channel"}, None), None),
        (ct_group({"strategy": "channel"}, {"strategy": "token", "dynamic": False}), None),
        (ct_group({"strategy": "channel", "type": "int"}, {"strategy": "token"}), None),
        (ct_group({"strategy": "block", "block_structure": [64, 64]}, {"strategy": "group", "group_size": 128}), None),
        (ct_group({"strategy": "channel"}, {"strategy": "token"}) | {"quantization_status": "frozen"}, None),
        (ct_group({"strategy": "channel"}, {"strategy": "token"}) | {"kv_cache_scheme": {"num_bits": 8}}, None),
    ],
)
def test_which_compressed_tensors_schemes_are_ours(config: dict, layer: type | None):
    from quantlab.quantizers import compressed_tensors_layers

    known, reason = compressed_tensors_layers(config)
    assert (not known) == (reason is not None)
    assert (known["Linear"][0] if known else None) is layer


def test_compressed_tensors_blocks_run_on_our_block_layer(quantized, edited, tmp_path: Path):
    """The same tensors under the other name give the same numbers."""
    source = quantized("llama", "fp8-block")
    folder = edited(source, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("weight_scale_inv", "weight_scale"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = ct_group(
        {"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 128}
    ) | {"ignore": config["quantization_config"]["modules_to_not_convert"]}
    (folder / "config.json").write_text(json.dumps(config))
    ids = source.inputs()["input_ids"]
    with torch.no_grad():
        assert torch.equal(quantlab.load(folder)(ids).logits, quantlab.load(source.folder)(ids).logits)


@pytest.fixture
def release(tiny, tmp_path: Path) -> Path:
    """A checkpoint as DeepSeek releases its models: FP8 blocks without a skip list, ragged ones too, and quantized
    layers for multi-token prediction, which no class of transformers has."""
    from quantlab_kernels import quantize_fp8_block

    source, folder = tiny("deepseek_v3"), tmp_path / "release"
    folder.mkdir()
    tensors = load_file(source.folder / "model.safetensors")
    tensors |= {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(128, 256, dtype=torch.bfloat16)
    for name in [n for n in tensors if re.search(r"(attn|mlp).*proj.*weight", n)]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8_block(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source.folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_deepseek_releases_loads(tiny, release: Path):
    """Its `kv_a_proj_with_mqa` has 576 rows: the last block is half empty. Ours has 160."""
    source, model = tiny("deepseek_v3"), quantlab.load(release)
    layer = model.model.layers[0].self_attn.kv_a_proj_with_mqa
    assert isinstance(layer, Fp8BlockLinear)
    assert layer.weight.shape == (160, 128)
    assert layer.weight_scale_inv.shape == (2, 1)
    with torch.no_grad():
        found = model(source.inputs()["input_ids"]).logits
        expected = quantlab.load(source.folder)(source.inputs()["input_ids"]).logits
    assert ((found - expected).norm() / expected.norm()).item() < 0.15


def test_what_deepseek_releases_is_verified_and_converted(release: Path, tmp_path: Path):
    problems = verify(release).problems
    assert problems
    assert all("kv_a_proj_with_mqa" in line for line in problems), "its ragged blocks, and nothing else"
    with pytest.raises(UsageError, match=r"would not load everywhere: .*kv_a_proj_with_mqa has 160 rows"):
        convert(release, "compressed-tensors", tmp_path / "out")
    convert(release, "bf16", tmp_path / "bf16")
    assert quantlab.plan(tmp_path / "bf16", "int4-fp8").quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_quantized_has_the_dtype_that_it_has_without_us(dtype: torch.dtype, tmp_path: Path):
    """DeepSeek-V4 keeps a part in 32 bits, and almost all of its tensors have other names in its checkpoints."""
    config = transformers.DeepseekV4Config(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=64,
        moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    source = transformers.DeepseekV4ForCausalLM
    source._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    quantlab.quantize(tmp_path / "in", "fp8-dynamic", tmp_path / "out", device="cpu", workers=1)
    plain, model = (source.from_pretrained(tmp_path / name, dtype=dtype) for name in ("in", "out"))
    wanted = {name: tensor.dtype for name, tensor in plain.named_parameters()}
    found = {name: t.dtype for name, t in model.named_parameters() if name in wanted and t.element_size() > 1}
    assert found == {name: wanted[name] for name in found}


def test_experts_without_a_gate_load_and_are_saved(tmp_path: Path):
    config = transformers.NemotronHConfig(
        hidden_size=128, layers_block_type=["moe", "attention"], num_attention_heads=2, num_key_value_heads=2,
        head_dim=64, moe_intermediate_size=128, moe_shared_expert_intermediate_size=128, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.NemotronHForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    quantlab.quantize(tmp_path / "in", "int4-fp8", tmp_path / "out", device="cpu", workers=1)
    convert(tmp_path / "out", "bf16", tmp_path / "bf16")
    model, plain = (quantlab.load(tmp_path / name, dtype=torch.float32) for name in ("out", "bf16"))
    assert [type(m) for m in model.modules() if isinstance(m, Experts)] == [Int4Fp8Experts]
    model.save_pretrained(tmp_path / "saved")
    read, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert read.keys() == saved.keys()
    assert all(torch.equal(read[name], saved[name]) for name in read)
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = model(ids).logits, plain(ids).logits
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.15


def test_scales_stored_in_ue8m0_are_kept(quantized, edited, tmp_path: Path):
    source = quantized("llama", "fp8-block")
    folder = edited(source, tmp_path / "a", scale_fmt="ue8m0")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].to(torch.float8_e8m0fnu)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = quantlab.load(folder)
    ids = source.inputs()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, quantlab.load(source.folder)(ids).logits)
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert {t.dtype for n, t in saved.items() if n.endswith("_scale_inv")} == {torch.float8_e8m0fnu}


@pytest.mark.parametrize(("activations", "used"), [("static", True), ("dynamic", False)])
def test_static_activation_scales_come_from_the_side_file(
    quantized, edited, tmp_path: Path, activations: str, used: bool
):
    source = quantized("rt_detr", "fp8-block")
    folder = edited(source, tmp_path)
    (folder / "quantlab").mkdir(exist_ok=True)
    name = "model.decoder.layers.0.self_attn.out_proj"  # transformers calls it o_proj
    scales = {name: torch.tensor([0.25])}
    save_file(scales, folder / "quantlab" / "activation_scales.safetensors", {"activations": activations})
    layer = quantlab.load(folder).model.decoder.layers[0].self_attn.o_proj
    assert isinstance(layer, Fp8BlockLinear)
    assert (layer.activation_scale is not None) == used


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "fp8-dynamic"), ("llama", "fp8-block"), ("llama", "int4"), ("qwen3_moe", "fp8-dynamic")],
)
def test_layers_on_disk_compute_what_they_compute_in_memory(
    quantized, edited, tmp_path: Path, monkeypatch, name: str, scheme: str
):
    """Scales kept beside the state dict are not what hooks bring: 16-bit ones of rows, static ones of activations."""
    monkeypatch.setenv("QUANTLAB_FUSE", "0")  # joined layers round elsewhere
    source = quantized(name, scheme)
    folder = edited(source, tmp_path / "model")
    if scheme == "fp8-block":
        (folder / "quantlab").mkdir(exist_ok=True)
        scales = {"model.layers.1.self_attn.q_proj": torch.tensor([0.25])}
        save_file(scales, folder / "quantlab" / "activation_scales.safetensors", {"activations": "static"})
    ids = source.inputs()["input_ids"]
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    for places in (dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}, {"model": "disk", "lm_head": "disk"}):
        given = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
        model = quantlab.load(folder, warmup=True, **given)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, quantlab.load(folder)(ids).logits)


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-dynamic"])
def test_attention_that_was_asked_for_stays(quantized, scheme: str):
    source = quantized("llama", scheme)
    asked = [source.model_class.from_pretrained(source.folder, attn_implementation=a) for a in (None, "sdpa", "eager")]
    assert [model.config._attn_implementation for model in asked] == ["quantlab", "sdpa", "eager"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["llama", "vit", "gemma3_vision"])
def test_another_dtype_holds_for_all_that_is_not_quantized(quantized, name: str, dtype: torch.dtype):
    source = quantized(name, "fp8-block")
    model = quantlab.load(source.folder, dtype=dtype)
    quantized_names = {
        f"{path}.{n}" for path, m in model.named_modules() if isinstance(m, Fp8Linear) for n in m._parameters
    }
    rest = {p.dtype for n, p in model.named_parameters() if n not in quantized_names}
    assert rest == {dtype}
    with torch.no_grad():
        assert model(**source.inputs(dtype)).logits.dtype == dtype


def test_experts_save_per_expert_names(quantized, tmp_path: Path):
    model = quantlab.load(quantized("qwen3_moe", "fp8-block").folder)
    assert any(isinstance(m, Fp8BlockExperts) for m in model.modules())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["model.layers.0.mlp.experts.3.gate_proj.weight_scale_inv"].shape == (1, 1)
    assert not any("gate_up_proj" in name for name in saved)


def test_experts_that_are_quantized_in_part_are_handed_over(quantized, edited, tmp_path: Path, caplog):
    source = quantized("qwen3_moe", "fp8-block")
    folder = edited(source, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16) * tensors.pop(f"{name}_scale_inv").to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # nor does transformers know what to do
        quantlab.load(folder)
    assert f"{name}: has no scale, others of the same parameter do" in caplog.text


def test_shards_of_a_saved_model_load_again(quantized, tmp_path: Path):
    source = quantized("qwen3_moe", "fp8-block")
    model = quantlab.load(source.folder)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = source.inputs()["input_ids"]
    with torch.no_grad():
        assert torch.equal(quantlab.load(tmp_path)(ids).logits, model(ids).logits)
