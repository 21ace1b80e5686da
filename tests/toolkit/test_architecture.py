from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantlab
from quantlab.architecture import architecture, keeps_rows_together


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def kinds_of(source) -> dict[str, str]:
    return architecture(source.folder, names_in(source.folder)).kinds


def test_a_decoder(tiny):
    found = architecture(tiny("llama").folder, names_in(tiny("llama").folder))
    assert found.class_name == "LlamaForCausalLM"
    assert found.kinds["model.layers.0.self_attn.q_proj.weight"] == "linear"
    assert found.modules["model.layers.0.self_attn.q_proj.weight"] == "model.layers.0.self_attn.q_proj"
    assert found.kinds["model.embed_tokens.weight"] == "embedding"
    assert found.kinds["model.norm.weight"] == "norm"
    assert found.kinds["lm_head.weight"] == "head"
    assert "lm_head" in found.linear_modules


def test_a_head_that_is_tied_and_not_in_the_file_is_a_linear_module(tiny):
    found = architecture(tiny("qwen2").folder, names_in(tiny("qwen2").folder))
    assert "lm_head.weight" not in found.kinds
    assert "lm_head" in found.linear_modules
    assert found.kinds["model.layers.0.self_attn.q_proj.bias"] == "other"


@pytest.mark.parametrize(
    ("name", "expert", "router"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.gate.weight"),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.experts.0.w1.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
        ),
        ("deepseek_v3", "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.gate.weight"),
    ],
)
def test_experts_and_their_router(tiny, name: str, expert: str, router: str):
    found = architecture(tiny(name).folder, names_in(tiny(name).folder))
    assert found.kinds[expert] == "expert"
    assert found.modules[expert].endswith(".mlp.experts")
    assert found.kinds[router] == "router"


CLASSES = {
    "afmoe": "AfmoeForCausalLM", "doge": "DogeForCausalLM", "gemma4_text": "Gemma4ForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM", "jetmoe": "JetMoeForCausalLM", "zaya": "ZayaForCausalLM",
}  # fmt: skip
DECODER = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "pad_token_id": 0, "moe_intermediate_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "config", "layer"),
    [
        ("afmoe", {"num_experts": 16, "num_dense_layers": 1}, "layers.1.mlp.router.gate"),
        ("doge", {"is_moe": True, "num_experts": 64}, "layers.0.mlp.router_gate"),
        ("gemma4_text", {"num_experts": 16, "top_k_experts": 2, "enable_moe_block": True}, "layers.0.router.proj"),
        ("hunyuan_v1_moe", {"num_experts": 16, "moe_topk": 2}, "layers.0.mlp.gate.wg"),
        ("jetmoe", {"num_local_experts": 16, "kv_channels": 32}, "layers.0.self_attention.experts.router.layer"),
        ("jetmoe", {"num_local_experts": 16, "kv_channels": 32}, "layers.0.mlp.router.layer"),
        ("zaya", {"num_experts": 16}, "layers.0.mlp.gate.router_mlp.fc1"),
        ("zaya", {"num_experts": 16}, "layers.0.mlp.gate.down_proj"),
    ],
)
def test_layers_inside_routers_are_routers(model_type: str, config: dict, layer: str, tmp_path: Path):
    """A router may be a module of several layers, and have as many outputs as would fit a kernel."""
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, **DECODER | config).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | {"architectures": [CLASSES[model_type]]}))
    name = f"model.{layer}.weight"
    assert architecture(tmp_path, [name]).kinds == {name: "router"}


def test_shared_experts_are_ordinary_layers(tiny):
    assert kinds_of(tiny("deepseek_v3"))["model.layers.1.mlp.shared_experts.up_proj.weight"] == "linear"


def test_renamed_tensors_are_found_under_both_names(tiny):
    found = architecture(tiny("rt_detr").folder, names_in(tiny("rt_detr").folder))
    assert (
        found.modules["model.decoder.layers.0.self_attn.out_proj.weight"] == "model.decoder.layers.0.self_attn.o_proj"
    )


def test_heads_that_share_weights_are_heads(tiny):
    kinds = kinds_of(tiny("d_fine"))
    assert kinds["model.decoder.class_embed.0.weight"] == "head"
    assert kinds["model.decoder.bbox_embed.1.layers.0.weight"] == "head"


def test_a_layer_whose_weight_is_used_by_another_module_is_not_linear(tiny):
    """`nn.MultiheadAttention` multiplies by its output projection's weight itself."""
    kinds = kinds_of(tiny("gemma3_vision"))
    (name,) = (n for n in kinds if n.endswith("head.attention.out_proj.weight"))
    assert kinds[name] == "other"


def test_layers_kept_in_32_bits_are_not_linear(tiny):
    kinds = kinds_of(tiny("t5"))
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "other"
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wi.weight"] == "linear"


def test_a_layer_whose_weight_its_model_changes_is_not_linear(tmp_path: Path):
    from transformers import RwkvConfig

    config = RwkvConfig(hidden_size=64, vocab_size=64, num_hidden_layers=1, architectures=["RwkvForCausalLM"])
    config.save_pretrained(tmp_path)
    names = [f"rwkv.blocks.0.{end}.weight" for end in ("attention.key", "attention.output", "feed_forward.value")]
    assert list(architecture(tmp_path, names).kinds.values()) == ["linear", "other", "other"]


def test_a_layer_whose_weight_its_model_reads_is_not_linear(tmp_path: Path):
    from transformers import MambaConfig

    MambaConfig(hidden_size=64, vocab_size=64, num_hidden_layers=1, architectures=["MambaForCausalLM"]).save_pretrained(
        tmp_path
    )
    names = [f"backbone.layers.0.mixer.{name}_proj.weight" for name in ("in", "x", "dt", "out")]
    assert [*architecture(tmp_path, names).kinds.values()] == ["linear", "linear", "other", "linear"]


def test_scales_follow_weights_that_are_joined_but_not_those_that_are_shared_out():
    from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

    joined = WeightConverter(["gate.weight", "up.weight"], "gate_up.weight", operations=[Concatenate(dim=0)])
    across = WeightConverter(["gate.weight", "up.weight"], "gate_up.weight", operations=[Concatenate(dim=1)])
    shared = WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], operations=[Chunk(dim=0)])
    assert [keeps_rows_together(converter) for converter in (joined, across, shared)] == [True, False, False]


def test_convolutions(tiny):
    assert kinds_of(tiny("whisper"))["model.encoder.conv1.weight"] == "conv"


def test_a_checkpoint_that_is_not_whole(tiny, tmp_path: Path):
    """What no other layer has may be left out by intent, as models for embeddings are saved without their head."""
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = "1 parameters of the model are not in the checkpoint (lm_head.weight); is it whole?"
    assert told in quantlab.plan(folder).warnings
    found = architecture(folder, [name for name in tensors if "layers.1.mlp" not in name])
    assert found.missing == (*found.gaps, "lm_head.weight")
    assert [name.rpartition(".mlp.")[2] for name in found.gaps] == [
        "gate_proj.weight", "up_proj.weight", "down_proj.weight"
    ]  # fmt: skip


def test_experts_that_are_not_whole(tiny):
    folder = tiny("qwen3_moe").folder
    gone = ("layers.1.mlp.experts.2.up_proj", "layers.0.mlp.experts.3.")  # the latter knows only the config
    found = architecture(folder, [name for name in names_in(folder) if not any(part in name for part in gone)])
    last = [f"model.layers.0.mlp.experts.3.{part}_proj.weight" for part in ("down", "gate", "up")]
    assert sorted(found.gaps) == sorted(found.missing) == [*last, "model.layers.1.mlp.experts.2.up_proj.weight"]


def test_tensors_that_the_model_ignores_are_left_out(tiny):
    folder = tiny("llama").folder
    found = architecture(folder, [*names_in(folder), "mtp.layers.0.proj.weight"])
    assert "mtp.layers.0.proj.weight" not in found.kinds
    assert len(found.kinds) == len(names_in(folder))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "no-such-model"},
        {"architectures": ["NoSuchClass"], "model_type": "llama"},
        {"auto_map": {"AutoConfig": "configuration_x.XConfig"}, "model_type": "x"},
        {},
    ],
)
def test_what_transformers_does_not_know_is_none(config: dict, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert architecture(tmp_path, ["a.weight"]) is None


def test_no_config_is_none(tmp_path: Path):
    assert architecture(tmp_path, []) is None
