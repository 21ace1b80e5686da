"""Orthogonal matrices that spread: orthogonal in float64, entries of one size."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from quantlab_calib.blockwise import Blockwise, Steps
from quantlab_calib.rotate import RotationError, hadamard


@pytest.mark.parametrize("size", [1, 2, 12, 64, 100, 128, 896, 1152])
def test_it_is_orthogonal(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 20, 28, 64, 76, 148, 384, 896])
def test_entries_are_of_one_size_where_a_hadamard_matrix_is_known(size):
    torch.testing.assert_close(hadamard(size).abs() * size**0.5, torch.ones(size, size, dtype=torch.float64))


def test_one_large_channel_is_spread_over_all():
    x = torch.zeros(896, dtype=torch.float64)
    x[17] = 100.0
    assert float((x @ hadamard(896)).abs().max()) == pytest.approx(100 / 896**0.5)


def test_the_seed_decides():
    assert torch.equal(hadamard(64, 1), hadamard(64, 1))
    assert not torch.equal(hadamard(64, 1), hadamard(64, 2))


def model_of(config, **changes):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12,
        "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    options = {"experts_implementation": "eager"} if any("experts" in key for key in changes) else {}
    model = AutoModelForCausalLM.from_config(config(**shape | changes), dtype=torch.float64, **options)
    for name, parameter in model.eval().requires_grad_(False).named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.2)
        elif "bias" in name:
            parameter.normal_(0.0, 0.3)
    return model


class Loaded:
    def load(self, path: str, recurse: bool = True) -> None: ...
    def release(self, path: str) -> None: ...


def rotated(model) -> Blockwise:
    """Rotate a model in place, by a run that rounds nothing."""
    tokens = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    device, float64 = torch.device("cpu"), lambda name: torch.float64
    run = Blockwise(
        model, tokens, Loaded(), "model.layers", lambda name: False, Steps(rotate=True), device=device, stored=float64
    )
    for block in run.run():
        assert block.rounded == {}
    return run


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LlamaConfig, {}),
        (Qwen2Config, {}),
        (Phi3Config, {"num_key_value_heads": 4}),
        (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ],
    ids=["llama", "qwen2", "phi3", "qwen3_moe"],
)
def test_float64_logits_do_not_change(config, changes):
    model = model_of(config, **changes)
    tokens = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(2))
    before, weight = model(tokens).logits, model.model.layers[1].self_attn.o_proj.weight.clone()
    run = rotated(model)
    after = model(tokens).logits
    assert float((after - before).abs().max()) < 1e-6 * float(before.abs().max())  # norms compute in float32
    assert not torch.allclose(model.model.layers[1].self_attn.o_proj.weight, weight, atol=1e-3)
    assert set(run.ends) == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (Gemma2Config, {}, "its output does not turn with its input"),  # norms behind the layers, too
        (CohereConfig, {}, "a CohereLayerNorm does not commute with turning"),  # takes the mean off
        (LlamaConfig, {"tie_word_embeddings": True}, "embeddings are tied to the output layer"),
        (
            GraniteMoeHybridConfig,  # of which a state-space layer norms what it has computed
            {"layer_types": ["mamba", "attention"], "mamba_n_heads": 6, "mamba_d_head": 16, "num_local_experts": 2},
            "mamba.norm: norms 96 channels, the stream has 48",
        ),
    ],
    ids=["gemma2", "cohere", "tied", "hybrid"],
)
def test_models_that_do_not_turn_are_refused(config, changes, reason):
    with pytest.raises(RotationError, match=reason):
        rotated(model_of(config, **changes))
