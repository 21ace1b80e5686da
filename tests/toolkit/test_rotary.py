"""The fused rotary embedding: found by trying, the same bits, no class changed."""

from __future__ import annotations

import copy
from types import FunctionType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from quantlab import rotary
from quantlab.rotary import fuse_rotary

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.arange(3, 15).reshape(2, 6)


def model_of(kind: str, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def fused_count(model: torch.nn.Module) -> int:
    return sum(map(fuse_rotary, model.modules()))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"])
def test_the_same_bits(kind: str, monkeypatch):
    model = model_of(kind)
    calls = []
    monkeypatch.setattr(rotary, "rope", lambda *args: calls.append(0) or torch.ops.quantlab.rope.default(*args))
    with torch.no_grad():
        expected = model(TOKENS, use_cache=True)
        assert fused_count(model) == 2
        assert fused_count(model) == 0, "once is enough"
        found = model(TOKENS, use_cache=True)
        assert len(calls) == 2
        assert torch.equal(found.logits, expected.logits)
        step = [model(TOKENS[:, :1], past_key_values=out.past_key_values).logits for out in (found, expected)]
    assert torch.equal(*step)
    assert isinstance(modeling_llama.LlamaAttention.forward, FunctionType)


@pytest.mark.parametrize("kind", ["cohere", "ernie4_5"])
def test_interleaved_embeddings_are_left_alone(kind: str):
    assert fused_count(model_of(kind)) == 0


def test_part_of_the_channels():
    def own(q, k, cos, sin, unsqueeze_dim=1):
        r = cos.shape[-1]
        turned = modeling_llama.apply_rotary_pos_emb(q[..., :r], k[..., :r], cos, sin, unsqueeze_dim)
        return tuple(torch.cat((out, x[..., r:]), -1) for out, x in zip(turned, (q, k), strict=True))

    assert rotary._is_rotary(own, 4)
    assert rotary._is_rotary(own, 8)
    assert not rotary._is_rotary(modeling_llama.apply_rotary_pos_emb, 4), "which raises for other sizes"
    ours = rotary._fused(own, partial=True)
    q, k = torch.randn(2, 3, 5, 16), torch.randn(2, 1, 5, 16)
    angle = torch.randn(1, 5, 8)
    with torch.no_grad():
        for x, y in zip(ours(q, k, angle.cos(), angle.sin()), own(q, k, angle.cos(), angle.sin()), strict=True):
            torch.testing.assert_close(x, y)
        swapped = [x.transpose(1, 2) for x in (q, k)]
        for dim, operands in ((1, (q, k)), (2, swapped)):
            found = ours(*operands, angle.cos(), angle.sin(), unsqueeze_dim=dim)
            for x, y in zip(found, own(*operands, angle.cos(), angle.sin(), unsqueeze_dim=dim), strict=True):
                torch.testing.assert_close(x, y)


def test_a_function_called_in_another_way_is_the_models_own():
    """Qwen4-Exp turns queries alone with the function that turns both."""

    def own(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
        both = modeling_llama.apply_rotary_pos_emb(q, q if k is None else k, cos, sin, unsqueeze_dim)
        return both[0] if k is None else both

    assert rotary._is_rotary(own, 8)
    q, angle = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 8)
    with torch.no_grad():
        alone = rotary._fused(own, partial=False)(q, cos=angle.cos(), sin=angle.sin())
    assert torch.equal(alone, own(q, None, angle.cos(), angle.sin()))


def test_gradients_and_graphs_take_the_models_own():
    model = model_of("llama")
    with torch.no_grad():
        expected = model(TOKENS).logits
    fused_count(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected)
    model(TOKENS).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_copy_is_a_whole_copy():
    model = model_of("llama")
    fused_count(model)
    other = copy.deepcopy(model)
    attention = other.model.layers[0].self_attn
    assert attention.forward.__self__ is attention
