"""Routers of real architectures on one kernel: the same experts, the same weights, or left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import quantlab
from quantlab import routing
from quantlab_kernels.moe_route import Rule

LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
MODELS = {
    "DeepseekV2": ({**LATENT, "topk_method": "greedy", "n_group": 1, "topk_group": 1}, Rule(2)),
    "DeepseekV2 in groups": (
        {**LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        Rule(2, groups=4, kept=2, factor=16.0),
    ),
    "DeepseekV3": (
        {**LATENT, "n_group": 4, "topk_group": 2},
        Rule(2, sigmoid=True, groups=4, kept=2, best=2, normalized=True, factor=2.5),
    ),
    "DeepseekV3 in groups that matter to one token in fifty": (
        {**LATENT, "n_group": 8, "topk_group": 7, "n_routed_experts": 256, "num_experts_per_tok": 4},
        Rule(4, sigmoid=True, groups=8, kept=7, best=2, normalized=True, factor=2.5),
    ),
    "Mixtral": ({}, Rule(2, normalized=True)),
    "Qwen3Moe": ({"norm_topk_prob": True}, Rule(2, normalized=True)),
    "Olmoe": ({}, Rule(2)),
}  # fmt: skip


def tiny(name: str, **changes):
    torch.manual_seed(0)
    common = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
        "num_experts_per_tok": 2, "num_experts": 16, "n_routed_experts": 16, "num_local_experts": 16,
        "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{name.split()[0]}Config")(**{**common, **changes})
    model = getattr(transformers, f"{name.split()[0]}ForCausalLM")(config).to(torch.bfloat16).eval()
    for router in routers(model):
        torch.nn.init.normal_(router.weight, 0, 0.1)
    return model


def routers(model):
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_router_is_recognized(name):
    changes, rule = MODELS[name]
    router = routers(tiny(name, **changes))[0]
    if (bias := getattr(router, "e_score_correction_bias", None)) is not None:
        bias.uniform_(0, 0.1)
        before = bias.clone()
    own = copy.deepcopy(router)
    assert routing._fuse(router)
    assert router.forward.rule == rule
    assert bias is None or torch.equal(bias, before), "it is tried with another bias, and gets its own back"
    hidden = torch.randn(3, 50, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    (logits, weights, index), theirs = router(hidden), own(hidden)
    torch.testing.assert_close(logits, theirs[0], rtol=2**-6, atol=2**-6)
    assert logits.dtype == theirs[0].dtype
    same = (index.sort(-1).values == theirs[2].sort(-1).values).all(-1)
    assert float(same.float().mean()) > 0.9
    places = index[same].argsort(-1), theirs[2][same].argsort(-1)
    found, expected = weights[same].gather(-1, places[0]), theirs[1][same].float().gather(-1, places[1])
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-6)


def test_a_router_that_does_more_is_left_alone():
    router = routers(tiny("Mixtral"))[0]
    own = type(router).forward

    class Other(type(router)):
        def forward(self, hidden_states):
            logits, weights, index = own(self, hidden_states)
            return logits, weights.sqrt(), index

    router.__class__ = Other
    assert not routing._fuse(router)
    assert "forward" not in vars(router)


@torch.no_grad()
def test_routers_of_a_loaded_checkpoint(tmp_path, monkeypatch):
    """Beside our experts only, and not where every layer is to be left by itself."""
    changes, _ = MODELS["DeepseekV3"]
    plain = tiny("DeepseekV3", **changes)
    assert routing.fuse_routers(plain) == 0
    plain.save_pretrained(tmp_path / "source")
    quantlab.quantize(tmp_path / "source", "fp8-block", tmp_path / "fp8")
    model = quantlab.load(tmp_path / "fp8", dtype=torch.bfloat16)
    (router,) = routers(model)
    assert isinstance(router.forward, routing.Route)
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    found = model(ids).logits
    monkeypatch.setenv("QUANTLAB_FUSE", "0")
    alone = quantlab.load(tmp_path / "fp8", dtype=torch.bfloat16)
    assert not any("forward" in vars(router) for router in routers(alone))
    assert float((found - alone(ids).logits).norm() / found.norm()) < 0.05
    with torch.enable_grad():
        assert router(torch.randn(1, 128, dtype=torch.bfloat16))[0].requires_grad
