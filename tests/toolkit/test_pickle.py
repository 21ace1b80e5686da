"""Models are copied, saved whole and sent to other processes, also after a forward, which leaves notes behind."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import quantlab

TOKENS = torch.arange(3, 11)[None]


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check(model, tokens: torch.Tensor) -> None:
    def generated(model):
        return model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)

    with torch.no_grad():
        for _ in range(2):  # norms learn whom they feed in the first
            expected = model(tokens).logits
        text = generated(model)
        for duplicate in (copy.deepcopy, through_pickle):
            other = duplicate(model)
            assert torch.equal(other(tokens).logits, expected), duplicate.__name__
            assert torch.equal(generated(other), text), duplicate.__name__
            next(other.parameters()).data.zero_()
            assert torch.equal(model(tokens).logits, expected), f"{duplicate.__name__} shares weights"


@pytest.mark.parametrize(("name", "kv"), [("deepseek_v2", "fp8"), ("llama", None)])
def test_after_a_forward_and_generation(name, kv, quantized):
    check(quantlab.load(quantized(name, "fp8-block").folder, kv=kv), TOKENS)


@pytest.mark.gpu
def test_on_a_gpu_too(quantized):
    """Where shared experts run among the routed ones, and norms, routers and queries have forwards of their own."""
    model = quantlab.load(quantized("deepseek_v2", "fp8-block").folder, kv="fp8", device_map="cuda")
    check(model, TOKENS.cuda())
