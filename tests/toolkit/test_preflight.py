"""What is decided about every kind of tensor, from names and shapes alone and with what transformers knows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import PreflightError, UsageError
from quantlab.kinds import Model, fused_group, in_tower, is_mtp, kind_of
from quantlab.pipeline import plan, quantize
from quantlab.preflight import Plan
from quantlab.scheme import Recipe, Rule
from quantlab.shards import TensorInfo

Make = Callable[..., Path]
MODEL = Model.of({"vocab_size": 1000, "num_experts": 8, "num_hidden_layers": 4, "model_type": "unheard_of"})


def weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def reasons(made: Plan) -> dict[str, str]:
    """module -> "" for quantized, else the reason."""
    return {d.module: "quantized" if d.scheme else d.reason for d in made.decisions}


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (256, 256), "linear"),
        ("model.layers.0.self_attn.q_proj.bias", (256,), "other"),
        ("model.layers.0.mlp.gate_proj.weight", (512, 256), "linear"),
        ("model.layers.0.mlp.gate.weight", (8, 256), "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 256), "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 256), "router"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", (512, 256), "expert"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", (512, 256), "expert"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", (512, 256), "linear"),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 1024, 256), "expert"),
        ("model.embed_tokens.weight", (1000, 256), "embedding"),
        ("transformer.wte.weight", (1000, 256), "embedding"),
        ("encoder.relative_attention_bias.weight", (32, 8), "embedding"),
        ("bert.embeddings.position_embeddings.weight", (512, 256), "embedding"),
        ("lm_head.weight", (1000, 256), "head"),
        ("classifier.weight", (10, 256), "head"),
        ("model.layers.0.input_layernorm.weight", (256,), "norm"),
        ("model.layers.0.ln_1.weight", (256,), "norm"),
        ("vit.patch_embed.proj.weight", (256, 3, 16, 16), "conv"),
        ("model.layers.0.linear_attn.conv1d.weight", (256, 1, 4), "conv"),
        ("model.layers.0.mamba.A_log", (256, 16), "other"),
        ("model.layers.0.mamba.dt_proj.weight", (256, 128), "other"),
        ("model.layers.0.attention.output.dense.weight", (256, 256), "linear"),
        ("model.layers.0.attention.output.weight", (256, 256), "linear"),
    ],
)
def test_kinds_by_name_and_shape(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert kind_of(TensorInfo(name, "BF16", shape, Path("x"), 0, 0), MODEL) == kind


def test_parts_of_a_model() -> None:
    assert is_mtp("model.layers.4.mlp.up_proj.weight", MODEL)
    assert is_mtp("mtp.fc.weight", MODEL)
    assert not is_mtp("model.layers.3.mlp.up_proj.weight", MODEL)
    seeing = Model.of({"text_config": {"num_hidden_layers": 4}, "vision_config": {}})
    assert in_tower("model.visual.blocks.0.attn.qkv.weight", seeing)
    assert in_tower("vision_tower.encoder.layers.0.mlp.fc1.weight", seeing)
    assert in_tower("multi_modal_projector.linear_1.weight", seeing)
    assert not in_tower("model.language_model.layers.0.mlp.up_proj.weight", seeing)
    assert not in_tower("vision_model.encoder.layers.0.mlp.fc1.weight", MODEL), "a vision model is no tower"
    assert fused_group("a.k_proj") == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert fused_group("a.other") == ("a.other",)


def test_a_plain_decoder(raw_checkpoint: Make) -> None:
    made = plan(raw_checkpoint())
    assert len(made.quantized) == 14
    found = reasons(made)
    assert found["lm_head"].startswith("output head")
    assert found["model.embed_tokens"].startswith("embedding")
    assert found["model.layers.0.input_layernorm"] == "norm"
    assert made.skip_modules == ("lm_head",)
    assert made.warnings == ()
    assert made.architecture is None
    by_reason = made.by_reason()
    assert by_reason["quantized: fp8-block"][0] == 14
    assert sum(nbytes for _, nbytes in by_reason.values()) == made.bytes_before


def test_a_tied_head_is_skipped_though_it_has_no_tensor(raw_checkpoint: Make) -> None:
    tensors = weights(model__layers__0__mlp__up_proj__weight=(256, 256), model__embed_tokens__weight=(320, 256))
    assert plan(raw_checkpoint(tensors, tie_word_embeddings=True)).skip_modules == ("lm_head",)


def test_shapes_that_do_not_fit_stay_with_all_that_is_fused_with_them(raw_checkpoint: Make) -> None:
    tensors = weights(
        l__q_proj__weight=(256, 256), l__k_proj__weight=(192, 256), l__v_proj__weight=(256, 256),
        l__o_proj__weight=(256, 256), l__q_a_proj__weight=(128, 256), l__kv_a_proj_with_mqa__weight=(576, 256),
        l__down_proj__weight=(256, 200),
    )  # fmt: skip
    made = plan(raw_checkpoint(tensors))
    found = reasons(made)
    misfit = "shape: N and K are not multiples of 128 and 128"
    assert {module for module, reason in found.items() if reason == "quantized"} == {"l.o_proj"}
    assert found["l.k_proj"] == found["l.kv_a_proj_with_mqa"] == found["l.down_proj"] == misfit
    assert found["l.q_proj"] == f"fused by engines with k_proj, which stays ({misfit})"
    assert found["l.q_a_proj"] == f"fused by engines with kv_a_proj_with_mqa, which stays ({misfit})"
    assert set(made.skip_modules) == {name.removesuffix(".weight") for name in tensors} - {"l.o_proj"}
    assert any("because engines fuse them" in warning for warning in made.warnings)
    rows = plan(raw_checkpoint(tensors, name="again"), "fp8-dynamic")
    assert {m for m, reason in reasons(rows).items() if reason != "quantized"} == {"l.down_proj"}, "200 % 16"


def test_nothing_that_can_be_quantized(raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(weights(l__up_proj__weight=(100, 100)))
    with pytest.raises(
        PreflightError, match=re.escape("nothing can be quantized; all layers stay, most of them: shape")
    ):
        plan(folder)
    folder = raw_checkpoint(weights(norm__weight=(128,)), name="norms")
    with pytest.raises(PreflightError, match="nothing can be quantized; it has no linear layer"):
        plan(folder)


def test_int4_without_data_says_what_would_lose_less(raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(weights(l__o_proj__weight=(256, 256)))
    said = [any("`--effort fast`" in text for text in plan(folder, recipe).warnings) for recipe in (
        Recipe("int4"), Recipe("int4-fp8"), Recipe("fp8-block"), "int4", "int4-fp8",
    )]  # fmt: skip
    assert said == [True, True, False, False, False]


def test_what_to_do_about_shapes_that_do_not_fit(raw_checkpoint: Make) -> None:
    folder = raw_checkpoint(weights(l__up_proj__weight=(192, 320)))
    with pytest.raises(
        PreflightError, match=r"shape: .* 128; fp8-dynamic takes shapes in multiples of 16: use --scheme"
    ):
        plan(folder)
    assert not plan(folder, "fp8-dynamic").warnings
    folder = raw_checkpoint(weights(l__o_proj__weight=(256, 256), l__down_proj__weight=(256, 208)), name="partly")
    advice = "1 layers stay in 16 bits because of their shape; fp8-dynamic takes shapes in multiples of 16: "
    assert any(text == advice + "use --scheme fp8-dynamic" for text in plan(folder).warnings)
    assert advice + "name them in a recipe with that scheme" in plan(folder, "int4").warnings
    mixed = Recipe("int4", rules=(Rule("l.down_proj", "fp8-dynamic"),))
    (hint,) = plan(folder, mixed).warnings
    assert hint.startswith("INT4 weights are rounded without data")
    folder = raw_checkpoint(weights(l__o_proj__weight=(256, 256), l__down_proj__weight=(256, 200)), name="odd")
    assert not any("fp8-dynamic" in text for text in plan(folder, "int4").warnings), "200 % 16"


def test_recipe_rules_leave_layers_alone_and_drag_their_groups_along(raw_checkpoint: Make) -> None:
    recipe = Recipe(rules=(Rule("model.layers.0.self_attn.k_proj", "none"), Rule("re:down", "none")))
    found = reasons(plan(raw_checkpoint(), recipe))
    assert found["model.layers.0.self_attn.k_proj"] == "recipe: model.layers.0.self_attn.k_proj"
    assert found["model.layers.0.self_attn.q_proj"].startswith("fused by engines with k_proj, which stays (recipe")
    assert found["model.layers.1.mlp.down_proj"] == "recipe: re:down"
    assert found["model.layers.1.self_attn.q_proj"] == found["model.layers.0.self_attn.o_proj"] == "quantized"


def test_the_first_rule_that_matches_wins_and_the_rest_gets_the_scheme(raw_checkpoint: Make) -> None:
    recipe = Recipe(rules=(Rule("*.0.mlp.*", "fp8-block"), Rule("re:mlp\\.down", "none")))
    found = reasons(plan(raw_checkpoint(), recipe))
    assert found["model.layers.0.mlp.down_proj"] == found["model.layers.1.mlp.up_proj"] == "quantized"
    assert found["model.layers.1.mlp.down_proj"] == "recipe: re:mlp\\.down"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("down_proj", "did you mean '*.down_proj'?"),
        ("*.dwn_proj", "did you mean '*.down_proj'?"),
        ("re:zzz", "patterns match whole names; layers end in: down_proj, gate_proj, k_proj, lm_head, o_proj"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, hint: str, raw_checkpoint: Make) -> None:
    with pytest.raises(UsageError, match=re.escape(f"pattern {pattern!r} matches no module")) as error:
        plan(raw_checkpoint(), Recipe(rules=(Rule(pattern, "none"),)))
    assert hint in str(error.value)


def test_patterns_in_the_names_of_transformers(tiny: Callable[[str], Any]) -> None:
    """Mixtral's experts are `block_sparse_moe.experts.0.w1` on disk and `mlp.experts` in transformers."""
    recipe = Recipe(rules=(Rule("model.layers.0.mlp.experts", "none"),))
    found = reasons(plan(tiny("mixtral").folder, recipe))
    assert found["model.layers.0.block_sparse_moe.experts.0.w1"] == "recipe: model.layers.0.mlp.experts"
    assert found["model.layers.1.block_sparse_moe.experts.0.w1"] == "quantized"


def test_the_coverage_gate(raw_checkpoint: Make) -> None:
    tensors = weights(l__up_proj__weight=(256, 256), l__strange=(256, 256))
    folder = raw_checkpoint(tensors)
    with pytest.raises(PreflightError, match=re.escape("50.0 % of the weights would be left alone without a known")):
        plan(folder)
    made = plan(folder, Recipe(rules=(Rule("l.strange", "none"),)))
    assert reasons(made)["l"] == "recipe: l.strange"
    small = tensors | weights(l__strange=(2, 256))
    assert reasons(plan(raw_checkpoint(small, name="small")))["l"] == "", "below one percent it passes"


def test_fused_experts_stay_where_no_loader_takes_them_apart(raw_checkpoint: Make) -> None:
    tensors = weights(
        l__self_attn__o_proj__weight=(256, 256),
        l__mlp__experts__gate_up_proj=(4, 512, 256), l__mlp__experts__down_proj=(4, 256, 256),
    )  # fmt: skip
    made = plan(raw_checkpoint(tensors, num_experts=4))
    assert reasons(made)["l.mlp.experts"].startswith("experts fused in one 3-D tensor")
    assert made.skip_modules == ("l.mlp.experts",)
    assert made.warnings[0].startswith("most weights stay in 16 bits: 9")


def test_routers_experts_mtp_and_towers(raw_checkpoint: Make) -> None:
    experts = {f"model.layers.0.mlp.experts.{i}.{p}_proj.weight": (256, 256) for i in range(4) for p in ("gate", "up")}
    tensors = weights(**experts) | weights(
        **{
            "model.layers.0.mlp.gate.weight": (4, 256),
            "model.layers.2.eh_proj.weight": (256, 512),
            "visual.blocks.0.attn.qkv.weight": (256, 256),
        }
    )
    text = {"num_hidden_layers": 2, "num_experts": 4}
    made = plan(raw_checkpoint(tensors, text_config=text, vision_config={}))
    found = reasons(made)
    assert len(made.quantized) == 8
    assert found["model.layers.0.mlp.gate"].startswith("router")
    assert found["model.layers.2.eh_proj"].startswith("multi-token prediction")
    assert found["visual.blocks.0.attn.qkv"].startswith("vision or audio tower")
    assert made.skip_modules == ("model.layers.0.mlp.gate", "model.layers.2.eh_proj", "visual.blocks.0.attn.qkv")
    wanted = Recipe(rules=(Rule("visual.*", "fp8-block"),))
    assert reasons(plan(made.source.folder, wanted))["visual.blocks.0.attn.qkv"] == "quantized", "if a rule says so"


def test_one_expert_that_stays_keeps_all_of_its_layer(raw_checkpoint: Make) -> None:
    names = [f"l.{layer}.experts.{i}.up_proj.weight" for layer in (0, 1) for i in range(3)]
    recipe = Recipe(rules=(Rule("l.0.experts.1.up_proj", "none"),))
    made = plan(raw_checkpoint(weights(**dict.fromkeys(names, (256, 256)))), recipe)
    assert {d.module for d in made.quantized} == {f"l.1.experts.{i}.up_proj" for i in range(3)}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "largest"),
    [(2, 2, 512, 2), (4, 4, 512, 4), (4, 1, 512, 4), (4, 4, 384, 1), (8, 8, 1024, 8)],
)
def test_tensor_parallel_size(heads: int, kv_heads: int, inner: int, largest: int, raw_checkpoint: Make) -> None:
    width, kv_width = heads * 128, kv_heads * 128
    tensors = weights(
        l__q_proj__weight=(width, 256), l__k_proj__weight=(kv_width, 256), l__o_proj__weight=(256, width),
        l__up_proj__weight=(inner, 256), l__down_proj__weight=(256, inner),
    )  # fmt: skip
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    assert plan(raw_checkpoint(tensors, **config)).tensor_parallel == largest


def test_experts_limit_tensor_parallelism(raw_checkpoint: Make) -> None:
    """Qwen3-30B-A3B: 768 = 6 x 128 columns of an expert split over 2 GPUs, not over 4."""
    names = {
        f"l.experts.0.{leaf}.weight": shape for leaf, shape in {"up_proj": (768, 256), "down_proj": (256, 768)}.items()
    }
    made = plan(raw_checkpoint(weights(**names), num_attention_heads=32, num_key_value_heads=4))
    assert made.tensor_parallel == 2


def test_plan_of_a_known_architecture(tiny: Callable[[str], Any]) -> None:
    made = plan(tiny("deepseek_v3").folder)
    found = reasons(made)
    assert made.architecture == "DeepseekV3ForCausalLM"
    assert found["model.layers.0.self_attn.kv_a_proj_with_mqa"].startswith("shape")
    assert found["model.layers.0.self_attn.q_a_proj"].startswith("fused by engines")
    assert found["model.layers.1.mlp.gate"].startswith("router")
    assert found["model.layers.1.mlp.experts.3.down_proj"] == "quantized"


def test_names_of_both_worlds_are_skipped(tiny: Callable[[str], Any]) -> None:
    """Mixtral's router is `block_sparse_moe.gate` on disk and `mlp.gate` in transformers."""
    skip = plan(tiny("mixtral").folder).skip_modules
    assert {"model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate", "lm_head"} <= set(skip)


def test_a_tied_head_of_a_known_architecture(tiny: Callable[[str], Any]) -> None:
    assert "lm_head" in plan(tiny("qwen2").folder).skip_modules
    assert "proj_out" in plan(tiny("whisper").folder).skip_modules


def test_fused_experts_are_taken_apart_where_the_loader_merges_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=128, num_experts=4, num_experts_per_tok=2, vocab_size=128,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    made = plan(tmp_path)
    by_tensor = {d.tensor: d for d in made.decisions}
    parts = dict(by_tensor["model.layers.0.mlp.experts.gate_up_proj"].parts)
    assert list(parts)[:3] == [
        f"model.layers.0.mlp.experts.{name}" for name in ("0.gate_proj", "0.up_proj", "1.gate_proj")
    ]
    fused = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(made.source.reader.read(parts["model.layers.0.mlp.experts.2.up_proj"]), fused[2, 128:])
    assert "model.layers.0.mlp.experts" not in made.skip_modules


def test_merged_weights_that_stay_beside_int4(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(
        **sizes, head_dim=64, num_hidden_layers=1, vocab_size=64, num_experts=4, moe_intermediate_size=48
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    said = "beside INT4 weights it merges none of 16 bits, and 12 stay "
    assert any(said + "(model.layers.0.mlp.experts.0." in line for line in plan(tmp_path, "int4").warnings)
    assert not any("merge" in line for line in plan(tmp_path, "fp8-dynamic").warnings)


def test_experts_that_are_not_for_our_layers(tmp_path: Path) -> None:
    """LongCat's experts that compute nothing have a row of the fused weight all the same."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig(
        hidden_size=64, ffn_hidden_size=64, expert_ffn_hidden_size=64, num_layers=1, num_attention_heads=2, head_dim=16,
        kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, vocab_size=64,
        n_routed_experts=4, zero_expert_num=2, moe_topk=2, pad_token_id=0,
    )  # fmt: skip
    LongcatFlashForCausalLM(config).save_pretrained(tmp_path)
    said = "quantlab leaves the result to transformers and engines: some of its experts compute nothing; leave the"
    assert any(said in line for line in plan(tmp_path, "fp8-dynamic").warnings)
    alone = Recipe("fp8-dynamic", rules=(Rule("*.experts.*", "none"),))
    assert not any("leaves the result" in line for line in plan(tmp_path, alone).warnings)


def test_experts_that_a_loader_would_ignore_are_refused(tmp_path: Path) -> None:
    """transformers takes the experts of Llama 4 one by one from compressed-tensors checkpoints, and nowhere else; so
    they cannot stay in 16 bits there."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=128, intermediate_size=128, intermediate_size_mlp=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, vocab_size=64, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(tmp_path)
    assert any(d.scheme is None and d.kind == "expert" for d in plan(tmp_path, "fp8-block").decisions)
    refused = r"feed_forward\.experts\.\w+: holds all experts, and would be ignored .*; use --scheme fp8-block"
    for scheme in ("fp8-dynamic", "int4-fp8"):
        assert all(d.scheme is not None for d in plan(tmp_path, scheme).decisions if d.kind == "expert")
        with pytest.raises(PreflightError, match=refused):
            plan(tmp_path, Recipe(scheme, rules=(Rule("*.experts", "none"),)))


def test_what_engines_do_not_load_stays_even_if_asked_for(raw_checkpoint: Make) -> None:
    made = plan(raw_checkpoint(), Recipe(rules=(Rule("lm_head", "fp8-block"),)))
    assert "lm_head" in made.skip_modules
    assert made.warnings[0].startswith("the recipe wants lm_head as fp8-block, but it stays (output head")


@pytest.mark.parametrize("stays", ["l.mlp.gate", "proj"])
def test_names_that_skip_lists_confuse_stay_together(stays: str, raw_checkpoint: Make) -> None:
    """transformers 5.17 takes `l.mlp.gate` for the beginning of `l.mlp.gate_proj`, any version `proj` for an end."""
    other = {"l.mlp.gate": "l.mlp.gate_proj", "proj": "l.attn.proj"}[stays]
    names = {f"{stays}.weight": (100, 256), f"{other}.weight": (256, 256), "l.attn.qkv.weight": (256, 256)}
    made = plan(raw_checkpoint(weights(**names)))
    assert reasons(made)[other].startswith("name begins or ends like that of a layer that stays")
    assert {d.module for d in made.quantized} == {"l.attn.qkv"}
    assert set(made.skip_modules) == {stays, other}


@pytest.mark.parametrize(
    ("name", "stay"),
    [("vit", "classifier"), ("rt_detr", "model.decoder.class_embed.0"), ("d_fine", "model.enc_score_head")],
)
def test_vision_models_keep_their_output_layers_only(name: str, stay: str, tiny: Callable[[str], Any]) -> None:
    made = plan(tiny(name).folder, "fp8-dynamic")
    assert reasons(made)[stay].startswith("output head")
    assert any("self_attn.q_proj" in d.module or "attention.query" in d.module or "attention.q_proj" in d.module
               for d in made.quantized)  # fmt: skip
    assert not any(d.reason.startswith("vision") for d in made.decisions)


def test_code_of_a_model_runs_only_with_the_flag(raw_checkpoint: Make, tmp_path: Path) -> None:
    code = "from pathlib import Path\nPath({!r}).touch()\nfrom transformers import PreTrainedConfig\n"
    folder = raw_checkpoint(
        auto_map={"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"},
        architectures=["XModel"],
    )
    for module in ("configuration_x", "modeling_x"):
        (folder / f"{module}.py").write_text(code.format(str(tmp_path / "ran")))
    assert len(plan(folder).quantized) == 14
    assert not (tmp_path / "ran").exists()


def test_weights_and_config_of_two_models(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 384}))
    said = "has shape [128, 256], by config.json it has [128, 384]; weights and config are not of one model"
    with pytest.raises(PreflightError, match=re.escape(said)):
        plan(folder)


@pytest.mark.parametrize("config", [{}, {"model_type": "unheard_of"}], ids=["known", "unknown"])
@pytest.mark.parametrize("recipe", ["fp8-block", Recipe.advised("int4")], ids=["streamed", "calibrated"])
@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w2.weight"),
        ("deepseek_v3", "model.layers.1.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_an_expert_without_one_of_its_matrices(
    name: str, gone: str, recipe: Any, config: dict[str, Any], tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = without(gone, tiny(name).folder, tmp_path / "model", **config)
    said = f"its files lack {gone}, which other layers or experts have; get the checkpoint again"
    with pytest.raises(PreflightError, match=re.escape(said)):
        quantize(folder, recipe, tmp_path / "out", device="cpu", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_layer_that_is_not_there(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    folder = without("model.layers.1.mlp.", tiny("llama").folder, tmp_path / "model")
    with pytest.raises(PreflightError, match=r"lack model\.layers\.1\.mlp\.gate_proj\.weight and 2 more, which"):
        plan(folder)


def test_layers_that_the_model_ignores_need_not_be_whole(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """DeepSeek's multi-token prediction, numbered past the last layer."""
    folder = shutil.copytree(tiny("deepseek_v3").folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    ahead = {name.replace("layers.1", "layers.2"): x.clone() for name, x in tensors.items() if ".layers.1.mlp" in name}
    del ahead["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors | ahead, folder / "model.safetensors", {"format": "pt"})
    assert plan(folder).by_reason()["multi-token prediction: carried over as it is"][0] == len(ahead)


def without(gone: str, model: Path, to: Path, **config: Any) -> Path:
    """A copy of a model that lacks what begins so, with fields of its config changed."""
    folder = shutil.copytree(model, to)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: x for n, x in tensors.items() if not n.startswith(gone)}, folder / "model.safetensors")
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"hidden_act": "nothing"}, {"hidden_size": "wide"}])
def test_a_config_that_transformers_cannot_build(
    change: dict[str, Any], tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    made = plan(folder)
    assert len(made.quantized) == 14
    assert "\n" not in "".join(made.warnings)


def test_plan_prints_and_serializes(raw_checkpoint: Make) -> None:
    made = plan(raw_checkpoint())
    data = made.to_dict()
    assert data["bytes_before"] == made.bytes_before > data["bytes_after"]
    assert {d["scheme"] for d in data["decisions"]} == {"fp8-block", None}
    titles = [title for title, _, _ in made.tables()]
    page = made._repr_html_()  # what a notebook shows
    assert page.count("<table>") == page.count("</table>") == len(titles)
    assert "<td>quantized: fp8-block</td>" in page
    assert "-&gt;" in page, "text is escaped"
    assert titles[0].endswith("what happens to its tensors")
