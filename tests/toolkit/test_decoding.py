"""The stop of `generate` that is read one step late."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
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
    decoding.stop_late(made.eval())
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
    decoding.stop_late(model)
    assert model.generate == before
    backbone = LlamaModel(model.config)
    decoding.stop_late(backbone)
    assert "generate" not in backbone.__dict__


def test_quantized_models_and_caches_have_it(model, tmp_path):
    del model.generate
    model.save_pretrained(tmp_path / "model")
    for ours in ({"kv": "int8"}, {"attention": "int8"}):
        assert "generate" in quantlab.load(tmp_path / "model", **ours).__dict__
    assert "generate" not in quantlab.load(tmp_path / "model").__dict__  # plain transformers, to compare with
    quantlab.quantize(tmp_path / "model", "fp8-dynamic", tmp_path / "quantized")
    assert "generate" in LlamaForCausalLM.from_pretrained(tmp_path / "quantized").__dict__


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
