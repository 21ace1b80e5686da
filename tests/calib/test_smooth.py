"""Scales move between layers: where they may is found by experiment, and the block stays what it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from quantlab_calib.capture import Walk, find_blocks
from quantlab_calib.smooth import EXPONENTS, Fold, apply, find_folds, search

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QKV = {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}
MLP = {"mlp.gate_proj.weight", "mlp.up_proj.weight"}
O_DOWN = {"self_attn.v_proj": {"self_attn.o_proj.weight"}, "mlp.up_proj": {"mlp.down_proj.weight"}}
EXPERTS = {f"mlp.experts.gate_up_proj[{e}]" for e in range(4)}

CASES = {
    "llama": (LlamaConfig, {}, {"input_layernorm": QKV, "post_attention_layernorm": MLP, **O_DOWN}),
    "qwen2": (Qwen2Config, {}, {"input_layernorm": QKV, "post_attention_layernorm": MLP, **O_DOWN}),
    "gemma2": (Gemma2Config, {}, {"input_layernorm": QKV, "pre_feedforward_layernorm": MLP, **O_DOWN}),
    "cohere": (CohereConfig, {}, {"input_layernorm": QKV | MLP, **O_DOWN}),
    "olmo2": (Olmo2Config, {}, O_DOWN),
    "phi3": (
        Phi3Config,
        {},
        {"input_layernorm": {"self_attn.qkv_proj.weight"}, "post_attention_layernorm": {"mlp.gate_up_proj.weight"}},
    ),
    "mixtral": (
        MixtralConfig,
        {"num_local_experts": 4},
        {
            "input_layernorm": QKV,
            "post_attention_layernorm": EXPERTS | {"mlp.gate.weight"},
            "self_attn.v_proj": O_DOWN["self_attn.v_proj"],
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        {
            "input_layernorm": QKV,
            "post_attention_layernorm": EXPERTS | {"mlp.gate.weight"},
            "self_attn.v_proj": O_DOWN["self_attn.v_proj"],
        },
    ),
}


def block_of(name: str, dtype=torch.float32):
    """A block of random weights, its path, and a function that runs it."""
    config, extra, _ = CASES[name]
    torch.manual_seed(0)
    experts = {"experts_implementation": "eager"} if "moe" in name or "mixtral" in name else {}
    model = AutoModelForCausalLM.from_config(config(**SHAPE, **extra), dtype=dtype, **experts).eval()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in parameter_name:
            parameter.normal_(0.0 if name.startswith("gemma") else 1.0, 0.2)
        elif "bias" in parameter_name:
            parameter.normal_(0.0, 0.3)
    path = find_blocks(model)
    walk = Walk(model, path, CPU)
    tokens = torch.randint(3, 64, (1, 24))
    return walk.blocks[0], f"{path}.0", lambda: walk.call(0, None, tokens)


@pytest.mark.parametrize("name", CASES)
def test_folds_are_found_and_leave_the_block_as_it_was(name):
    block, path, run = block_of(name)
    folds, notes = find_folds(block, path, run)
    found = {f.producer.removeprefix(f"{path}."): {c.removeprefix(f"{path}.") for c in f.consumers} for f in folds}
    assert found == CASES[name][2]
    assert notes == []
    before = run()
    for fold in folds:
        size = int(fold.channels.max()) + 1
        apply(fold, torch.rand(size, generator=torch.Generator().manual_seed(1)) * 3 + 0.3, block, path)
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-4)


def test_channels_of_a_head_belong_to_all_its_query_heads():
    block, path, run = block_of("llama")
    fold = next(f for f in find_folds(block, path, run)[0] if f.producer.endswith("v_proj"))
    heads = torch.arange(32).unflatten(0, (2, 16)).repeat_interleave(2, dim=0)
    assert torch.equal(fold.channels, heads.flatten())


def test_norms_that_add_one_are_known_by_what_they_do():
    folds = {name: find_folds(*block_of(name))[0][0] for name in ("llama", "gemma2")}
    assert folds["llama"].offset == 0.0
    assert folds["gemma2"].offset == 1.0


def test_consumers_undo_what_a_norm_became_in_its_own_dtype():
    block, path, run = block_of("gemma2")
    before = run()
    fold = find_folds(block, path, run)[0][0]
    apply(fold, torch.linspace(0.2, 5.0, 64), block, path, torch.bfloat16)
    weight = block.get_submodule(fold.producer.removeprefix(f"{path}.")).weight
    assert torch.equal(weight, weight.to(torch.bfloat16).float())
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-4)


class Leaky(nn.Module):
    """A norm that something else than linear layers reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.tanh(self.up(y))) + y


def test_a_reader_that_is_no_linear_layer_refuses_the_fold():
    torch.manual_seed(0)
    block, x = Leaky().requires_grad_(False), torch.randn(8, 32)
    folds, notes = find_folds(block, "b", lambda: block(x))
    assert folds == []
    assert notes == ["b.norm: scales do not fold into it without changing the block"]


def test_the_search_helps_where_channels_differ():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=generator) * torch.exp(2 * torch.randn(128, generator=generator))
    weights = {"w": torch.randn(64, 128, generator=generator)}
    fold = Fold("norm", ("w",), torch.arange(128))
    scale, chosen = search(fold, ["w"], weights, {"w": x}, lambda given: given, EXPONENTS)
    assert chosen[0] > 0
    assert scale.shape == (128,)
    assert float((scale.log().mean()).abs()) < 1e-5
