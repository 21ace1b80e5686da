"""What config fields say of weights: every engine reads ours, and any of others is read or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.checkpoint import Stored, quantization_config, stored_in
from quantlab.errors import PreflightError
from quantlab.kinds import Model, kind_of
from quantlab.parallel import largest_tensor_parallel
from quantlab.scheme import SCHEMES
from quantlab.shards import TensorInfo


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_config_says_how_weights_are_stored(scheme: str) -> None:
    stored = Stored.of(SCHEMES[scheme], ["lm_head", "model.layers.0.mlp.gate"])
    back = stored_in({"quantization_config": quantization_config(stored)})
    assert back is not None
    assert (back.layout, back.weight.block, back.input, back.skip) == (
        stored.layout, stored.weight.block, stored.input, stored.skip,
    )  # fmt: skip
    assert back.scheme == scheme
    assert stored_in({"model_type": "llama"}) is None


def test_a_quantization_that_is_not_read_is_named() -> None:
    with pytest.raises(PreflightError, match="gptq 4 is a format that quantlab does not read"):
        stored_in({"quantization_config": {"quant_method": "gptq", "bits": 4}})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
args = st.fixed_dictionaries(
    {"num_bits": st.just(8), "type": st.just("float")},
    optional={
        "strategy": st.sampled_from(["tensor", "channel", "group", "block", "none", 3]),
        "group_size": json_values,
        "block_structure": json_values | st.just([128, 128]),
    },
)
quantizations = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["fp8", "compressed-tensors", "gptq", None, 3])},
    optional={
        "weight_block_size": json_values | st.just([128, 128]),
        "modules_to_not_convert": json_values,
        "ignore": json_values,
        "format": st.just("float-quantized") | json_values,
        "config_groups": json_values
        | st.fixed_dictionaries({"g": st.fixed_dictionaries({"weights": args | json_values})}),
    },
)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries({}, optional={"quantization_config": quantizations | json_values, "text_config": json_values})
)
def test_any_config_is_read_or_refused_in_one_line(config: dict[str, object]) -> None:
    try:
        stored = stored_in(config)
    except PreflightError as error:
        said = str(error)
        assert "\n" not in said
    else:
        assert stored is None or all(isinstance(name, str) for name in stored.skip)


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ["text_config", "vocab_size", "num_experts", "num_hidden_layers", "num_attention_heads", "model_type",
             "num_key_value_heads", "vision_config", "tie_word_embeddings"], json_values,
        ),
    )
)  # fmt: skip
def test_any_config_can_be_planned_with(config: dict[str, object]) -> None:
    model = Model.of(config)
    info = TensorInfo("model.layers.0.mlp.up_proj.weight", "BF16", (128, 128), Path("x"), 0, 32768)
    assert kind_of(info, model) in ("linear", "head", "expert", "embedding")
    assert largest_tensor_parallel([], config) >= 1


def test_fp8_config_is_what_every_engine_reads() -> None:
    config = quantization_config(Stored.of(SCHEMES["fp8-block"], ["lm_head"]))
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }


def test_compressed_tensors_parses_our_config() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    block = replace(Stored.of(SCHEMES["fp8-block"], ["lm_head"]), layout="float-quantized")
    for stored, strategies in (
        (Stored.of(SCHEMES["fp8-dynamic"], ["lm_head"]), ("channel", "token")),
        (block, ("block", "group")),
    ):
        parsed = QuantizationConfig.model_validate(quantization_config(stored))
        group = parsed.config_groups["group_0"]
        assert (group.weights.strategy, group.input_activations.strategy) == strategies
        assert parsed.ignore == ["lm_head"]
