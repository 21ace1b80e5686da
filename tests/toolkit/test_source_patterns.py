"""Reading a `forward`: what may be fused, and above all what may not."""

from __future__ import annotations

from torch import nn
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention
from transformers.models.doge.modeling_doge import DogeAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeDenseActDense
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.rwkv.modeling_rwkv import RwkvModel
from transformers.models.whisper.modeling_whisper import WhisperAttention

from quantlab.source_patterns import (
    GatedMlp,
    computes_on_cached,
    computes_on_mask,
    gated_mlp,
    shared_inputs,
    weights_read,
    weights_written,
)

QKV = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def test_self_attention_shares_its_input():
    assert shared_inputs(LlamaAttention.forward, QKV) == [("q_proj", "k_proj", "v_proj")]
    assert shared_inputs(BertSelfAttention.forward, frozenset({"query", "key", "value"})) == [("query", "key", "value")]


def test_cross_attention_shares_keys_and_values_only():
    assert shared_inputs(WhisperAttention.forward, QKV) == [("k_proj", "v_proj")]


def test_latent_attention_shares_both_compressions():
    layers = frozenset({"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"})
    groups = shared_inputs(DeepseekV3Attention.forward, layers)
    assert len(groups) == 1
    assert {"q_a_proj", "kv_a_proj_with_mqa"} <= set(groups[0])


def test_gated_mlp():
    expected = GatedMlp(gate="gate_proj", up="up_proj", down="down_proj", act="act_fn")
    assert gated_mlp(LlamaMLP.forward) == expected
    assert gated_mlp(Phi3MLP.forward) is None


def swapped(self, x):
    return self.down(self.up(x) * self.act(self.gate(x)))


def scaled(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x) * 2)


def mixed(self, x, y):
    return self.down(self.act(self.gate(x)) * self.up(y))


def changed(self, x):
    x = self.norm(x)
    return self.down(self.act(self.gate(x)) * self.up(x))


def test_gated_mlp_must_be_all_that_forward_does():
    assert gated_mlp(swapped) == GatedMlp("gate", "up", "down", "act")
    assert gated_mlp(scaled) is None
    assert gated_mlp(mixed) is None
    assert gated_mlp(changed) is None


def reassigned(self, x):
    a = self.q(x)
    x = x + 1
    return a + self.k(x) + self.v(x)


def assigned_from_itself(self, x):
    x = self.q(x)
    return self.k(x)


def called_twice(self, x):
    return self.q(x) + self.k(x) + self.q(x + 1)


def with_keywords(self, x):
    return self.q(x) + self.k(x, scale=2)


def test_a_new_value_under_the_same_name_is_another_value():
    layers = frozenset({"q", "k", "v"})
    assert shared_inputs(reassigned, layers) == [("k", "v")]
    assert shared_inputs(assigned_from_itself, layers) == []
    assert shared_inputs(called_twice, layers) == []
    assert shared_inputs(with_keywords, layers) == []


def test_a_forward_without_source_is_left_alone():
    namespace: dict = {}
    exec("def forward(self, x):\n    return self.q(x) + self.k(x)", namespace)
    assert shared_inputs(namespace["forward"], frozenset({"q", "k"})) == []
    assert gated_mlp(namespace["forward"]) is None
    assert gated_mlp(len) is None


class Reads(nn.Module):
    def forward(self, x):
        if self.training:
            return x @ self.slow.weight
        x = self.cast(x.to(self.cast.weight.dtype))
        return self.scan(self.called(x.to(self.called.weight.device)))

    def scan(self, x):
        return x @ self.multiplied.weight


def test_weights_that_a_model_reads_itself():
    assert weights_read(Reads) == {"cast", "multiplied"}
    assert weights_read(LlamaAttention) == frozenset()
    assert "dt_proj" in weights_read(MambaMixer)
    assert weights_read(MambaMixer).isdisjoint({"in_proj", "x_proj", "out_proj"})  # read only to train
    assert weights_read(NllbMoeDenseActDense) == {"fc2"}


class Scales(nn.Module):
    def forward(self, x):
        if not self.training:
            for block in self.blocks:
                block.attention.output.weight.div_(2)
                block.feed_forward.weight.requires_grad_(False)
        return x / self.last.weight.abs()


def test_weights_that_a_model_changes_itself():
    assert weights_written(Scales) == {"attention.output"}
    assert weights_written(RwkvModel) == {"attention.output", "feed_forward.value"}
    assert weights_written(LlamaAttention) == frozenset()


def test_attention_that_computes_on_its_mask_or_on_cached_keys():
    assert computes_on_mask(DogeAttention.forward)
    assert not any(computes_on_mask(kind.forward) for kind in (LlamaAttention, LlamaMLP, DiffLlamaAttention))
    assert all(computes_on_cached(kind.forward) for kind in (DiffLlamaAttention, DogeAttention, JetMoeAttention))
    assert not any(computes_on_cached(kind.forward) for kind in (LlamaAttention, LlamaMLP, GPT2Attention))
