"""Shared experts among the routed ones: the same numbers, the same checkpoint, or left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import quantlab
from quantlab import int4_experts, int4_linear, shared_experts
from quantlab.errors import VerificationError
from quantlab.scheme import Recipe
from quantlab.shared_experts import FusedBlock
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.int4 import repack_int4

CONFIG = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "pad_token_id": 0,
    "num_experts_per_tok": 2, "n_routed_experts": 8, "max_position_embeddings": 64, "kv_lora_rank": 32,
    "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


def model_of(tmp_path, scheme: str, shared: int):
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**CONFIG, n_shared_experts=shared)
    source = transformers.DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    torch.nn.init.normal_(source.model.layers[1].mlp.gate.weight, 0, 0.1)
    source.save_pretrained(tmp_path / "source")
    quantlab.quantize(tmp_path / "source", Recipe(scheme), tmp_path / scheme)
    return quantlab.load(tmp_path / scheme, dtype=torch.bfloat16)


def relative(x, y):
    return float((x - y).float().norm() / y.float().norm())


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-dynamic", "int4-fp8"])
@pytest.mark.parametrize("shared", [1, 2])
@torch.no_grad()
def test_shared_experts_are_further_experts(tmp_path, scheme: str, shared: int):
    model = model_of(tmp_path, scheme, shared)
    block = model.model.layers[1].mlp
    assert not shared_experts._fuse(block), "only on GPUs"
    own, before = copy.deepcopy(block), {k: v.clone() for k, v in model.state_dict().items()}
    layers = shared_experts._layers(block)
    assert layers is not None
    assert shared_experts.append(block, layers)
    assert isinstance(block.forward, FusedBlock)
    assert block.experts.num_experts == 8 + shared
    x = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    # with a scale per token, two experts have one each where the shared layer has one for both
    assert relative(block(x), own(x)) < (0.01 if scheme == "fp8-block" else 0.03)
    assert relative(block(x.float()), own(x.float())) < 1e-6, "other dtypes go the model's way"
    after = model.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(after[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    twin = copy.deepcopy(block).to(torch.float16)
    assert relative(twin(x.half()), own(x)) < 0.03


@pytest.mark.parametrize("scheme", ["fp8-block", "int4-fp8"])
@torch.no_grad()
def test_copies_follow_what_is_loaded_and_are_not_saved(scheme: str, tmp_path):
    model = model_of(tmp_path, scheme, 2)
    block = model.model.layers[1].mlp
    assert shared_experts.append(block, shared_experts._layers(block))
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = block(x)
    model.save_pretrained(tmp_path / "saved")
    again = quantlab.load(tmp_path / "saved", dtype=torch.bfloat16)
    assert relative(again.model.layers[1].mlp(x), expected) < 0.01
    state = {n: t * 2 if "shared_experts.down_proj.weight_scale" in n else t for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    block.experts.finish_loading()
    again.load_state_dict(state)
    assert relative(block(x), again.model.layers[1].mlp(x)) < 0.01
    assert relative(block(x), expected) > 0.05


@pytest.mark.parametrize("shared", [1, 2])
@torch.no_grad()
def test_copies_in_the_layout_of_hopper(tmp_path, shared: int, monkeypatch: pytest.MonkeyPatch):
    """INT4 words lie there in tiles, of all experts one after another; the reference reads them too."""
    for module in (int4_linear, int4_experts):
        monkeypatch.setattr(module, "prepare_int4", repack_int4)
    model = model_of(tmp_path, "int4-fp8", shared)
    block = model.model.layers[1].mlp
    own, before = copy.deepcopy(block), {k: v.clone() for k, v in model.state_dict().items()}
    assert block.experts.down_proj_packed.dim() > 3
    for name in ("gate_up_proj", "down_proj"):  # strides of a scale as that GPU's kernels read it
        scale = getattr(block.experts, name + "_scale")
        scale.data = as_group_scale(scale.data.flatten(0, 1)).unflatten(0, scale.shape[:2])
    assert shared_experts.append(block, shared_experts._layers(block))
    assert block.experts.down_proj_packed.dim() > 3
    assert len(block.experts.down_proj_packed) == 8 + shared
    x = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert relative(block(x), own(x)) < 0.02
    block.experts.finish_loading()
    assert relative(block(x), own(x)) < 0.02
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["shared_experts", "shared_experts.gate_proj", "shared_experts.down_proj"])
@torch.no_grad()
def test_shared_experts_that_were_touched_are_called(tmp_path, name: str):
    block = model_of(tmp_path, "fp8-block", 1).model.layers[1].mlp
    own = copy.deepcopy(block)
    assert shared_experts.append(block, shared_experts._layers(block))
    x = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    fast, called = block(x), []
    twin = copy.deepcopy(block)
    hook = twin.get_submodule(name).register_forward_hook(lambda *given: called.append(name))
    assert relative(twin(x), fast) < 0.03
    assert called == [name]
    hook.remove()
    assert torch.equal(twin(x), fast), "without hooks as before"
    for module in (own, block):
        module.set_submodule(name, torch.nn.Sequential(module.get_submodule(name), Double()))
    assert relative(fast, own(x)) > 0.1
    assert relative(block(x), own(x)) < 0.01


class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@torch.no_grad()
def test_a_block_that_does_more_is_left_alone(tmp_path):
    model = model_of(tmp_path, "fp8-block", 1)
    block = model.model.layers[1].mlp
    own = type(block).forward

    class Twice(type(block)):
        def forward(self, hidden_states):
            return 2 * own(self, hidden_states)

    block.__class__ = Twice
    assert not shared_experts.append(block, shared_experts._layers(block))
    assert "forward" not in vars(block)
    assert block.experts.num_experts == 8
    block.shared_experts.act_fn = torch.nn.GELU()
    del block.shared_experts.forward
    assert shared_experts._layers(block) is None


@torch.no_grad()
def test_wrong_copies_are_noticed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    block = model_of(tmp_path, "fp8-block", 1).model.layers[1].mlp
    monkeypatch.setattr("quantlab.experts.Fp8Experts._copy_shared", lambda experts: None)
    monkeypatch.setattr(
        "quantlab.experts.lengthened", lambda x, more: torch.cat([x.float(), x.float()[:more]]).to(x.dtype)
    )
    with pytest.raises(VerificationError, match="give other results among the routed ones on cpu; QUANTLAB_FUSE=0"):
        shared_experts.append(block, shared_experts._layers(block))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-dynamic", "int4-fp8"])
@torch.no_grad()
def test_on_the_gpu(tmp_path, scheme: str, monkeypatch: pytest.MonkeyPatch):
    model_of(tmp_path, scheme, 2)
    fused = quantlab.load(tmp_path / scheme, dtype=torch.bfloat16, device_map="cuda")
    assert isinstance(fused.model.layers[1].mlp.forward, FusedBlock)
    monkeypatch.setattr("quantlab.quantizers.fuse_shared", lambda model: 0)
    apart = quantlab.load(tmp_path / scheme, dtype=torch.bfloat16, device_map="cuda")
    assert not isinstance(vars(apart.model.layers[1].mlp).get("forward"), FusedBlock)
    for tokens in (1, 7, 300):
        x = torch.randn(1, tokens, 128, device="cuda", dtype=torch.bfloat16)
        assert relative(fused.model.layers[1].mlp(x), apart.model.layers[1].mlp(x)) < 0.02
