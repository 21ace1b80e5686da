"""Decoding steps that the GPU does not wait for: late stops, steps without guards on modules."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.generation import utils

import quantlab
from quantlab import decoding

gpu = pytest.mark.gpu
CHECK = getattr(utils, "DeferredStopCheck", None)
pytestmark = pytest.mark.skipif(CHECK is None, reason="this transformers has no deferred stop")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96, max_position_embeddings=256, eos_token_id=5, pad_token_id=0, bos_token_id=1,
        )
    )  # fmt: skip
    decoding.prepare(made.eval())
    return made


def test_only_inside_generate_of_a_model_of_ours(model):
    assert not CHECK.is_supported(CUDA, None, False, is_assistant=False)
    with decoding._late_stops():
        assert CHECK.is_supported(CUDA, None, False, is_assistant=False)
        assert CHECK.is_supported(CUDA, DynamicCache(), False, is_assistant=False)
        assert not CHECK.is_supported(CUDA, DynamicCache(), True, is_assistant=False)
        assert not CHECK.is_supported(CUDA, None, False, is_assistant=True)
        assert not CHECK.is_supported(CPU, None, False, is_assistant=False)
    assert not CHECK.is_supported(CUDA, None, False, is_assistant=False)


def test_generate_asks_inside(model, monkeypatch):
    asked = []
    monkeypatch.setattr(CHECK, "is_supported", staticmethod(lambda *a, **k: asked.append(decoding._LATE.get())))
    prompt = torch.tensor([[1, 7, 9]])
    model.generate(prompt, max_new_tokens=3)
    copied = copy.deepcopy(model)
    assert copied.generate.__self__ is copied
    copied.generate(prompt, max_new_tokens=3)
    LlamaForCausalLM(model.config).generate(prompt, max_new_tokens=3)
    assert asked == [True, True, False]


def test_models_that_cannot_generate_and_second_calls_change_nothing(model):
    before = model.generate
    decoding.prepare(model)
    assert model.generate == before
    backbone = LlamaModel(model.config)
    decoding.prepare(backbone)
    assert "generate" not in backbone.__dict__


def test_quantized_models_and_caches_have_it(model, tmp_path):
    del model.generate
    model.save_pretrained(tmp_path / "model")
    for ours in ({"kv": "int8"}, {"attention": "int8"}):
        assert "generate" in quantlab.load(tmp_path / "model", **ours).__dict__
    assert "generate" not in quantlab.load(tmp_path / "model").__dict__  # plain transformers, to compare with
    quantlab.quantize(tmp_path / "model", "fp8-dynamic", tmp_path / "quantized")
    assert "generate" in LlamaForCausalLM.from_pretrained(tmp_path / "quantized").__dict__


CHANGES = {
    "another layer": lambda m: setattr(m.model.layers[1], "mlp", copy.deepcopy(m.model.layers[1].mlp)),
    "another parameter": lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight.clone())),
    "another dtype": lambda m: m.to(torch.float16),
    "a mode": lambda m: m.model.layers[0].train(),
    "a number": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.5),
    "a hook": lambda m: m.model.norm.register_forward_hook(lambda *_: None),
    "a list": lambda m: m.config.__dict__.setdefault("layer_types", []).append("more"),
    "attention": lambda m: m.set_attn_implementation("eager"),
    "a new forward": lambda m: setattr(m.model.norm, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_compiled_again_after(change, model, monkeypatch):
    made = []
    monkeypatch.setattr(
        torch, "compile", lambda call, **options: made.append(options) or (lambda *a, **k: call(*a, **k))
    )
    first = model.get_compiled_call(None)
    model.lm_head.weight.data.add_(0.5)
    assert model.get_compiled_call(None) is first
    CHANGES[change](model)
    second = model.get_compiled_call(None)
    assert second is not first
    assert model.get_compiled_call(None) is second
    ours = [options["backend"] for options in made if isinstance(options.get("backend"), decoding._Graphs)]
    assert len(ours) == 2
    assert ours[0] is not ours[1]


def test_other_ways_of_compiling_stay(model):
    usual = LlamaForCausalLM(model.config).eval()
    decoding.prepare(usual)
    assert usual.get_compiled_call(CompileConfig(mode="default")) is usual._compiled_call
    usual.generation_config.compile_config = CompileConfig(mode="default")
    assert usual.get_compiled_call(None) is usual._compiled_call
    assert model.get_compiled_call(None) is not model._compiled_call
    model.model.rotary_emb.rope_type = "dynamic"  # its forward replaces frequencies
    assert model.get_compiled_call(None) is model._compiled_call


def test_guards_of_inputs_stay():
    modules = ["L['self']._modules['model']", "L['self']._modules['lm_head']._parameters['weight']"]
    others = ["L['input_ids']", "L['past_key_values'].layers[0].keys", "L['self'].training", "G['torch']"]
    guards = [SimpleNamespace(name=name) for name in modules + others]
    assert decoding._on_inputs(guards) == [False, False, True, True, True, True]


def test_two_models_of_a_class_do_not_share_steps(model, monkeypatch):
    """Without guards on modules nothing but the backend tells their compiled steps apart."""
    graphs = []
    monkeypatch.setattr(decoding._Graphs, "__call__", lambda self, graph, inputs: graphs.append(self) or graph.forward)
    torch.manual_seed(7)
    other = LlamaForCausalLM(LlamaConfig(**model.config.to_diff_dict() | {"num_hidden_layers": 3})).eval()
    decoding.prepare(other)
    tokens = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        for made in (model, other, model):
            found = made.get_compiled_call(None)(tokens, use_cache=False).logits
            assert torch.allclose(found, made(tokens, use_cache=False).logits, atol=1e-5)
        model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
        found = model.get_compiled_call(None)(tokens, use_cache=False).logits
        assert torch.allclose(found, model(tokens, use_cache=False).logits, atol=1e-5)
    assert len(graphs) == 3
    torch._dynamo.reset()


@gpu
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")
def test_the_same_tokens_on_the_gpu(model, cache, monkeypatch):
    """Rows that end at different steps, one step late, against transformers' own loop."""
    model = model.to("cuda")
    torch.manual_seed(1)
    prompt = torch.randint(6, 96, (4, 12), device="cuda")
    arguments = {"max_new_tokens": 48, "do_sample": False, "cache_implementation": cache}
    free = type(model).generate(model, prompt, **arguments, return_dict_in_generate=False, eos_token_id=None)
    ends = free[0, 12 + 20].item()  # a token that some row writes before the last step
    made = []
    monkeypatch.setattr(CHECK, "__init__", _noting(CHECK.__init__, made))
    late = model.generate(prompt, **arguments, eos_token_id=ends)
    assert len(made) == 1
    at_once = type(model).generate(model, prompt, **arguments, eos_token_id=ends)
    assert len(made) == 1
    assert torch.equal(late, at_once)


def _noting(original, made):
    def init(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    return init
