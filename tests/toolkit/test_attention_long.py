"""A whole model over a long context: which of two tokens was there more often?

A Llama of one layer that attends to all tokens alike. Values are 1.5 for one token and 0.5 for the other, and the
residual takes 1 from their average, so 54 % of one token leave 0.04 to decide by. Sums that lose a few percent on the
way, as those of an FP8 tensor core that runs on over all keys (14 bits), give the wrong answer.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantlab import attention

A, B, QUESTION = 0, 1, 2
D = 64


def model(device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=D, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=3, max_position_embeddings=131072, head_dim=D, tie_word_embeddings=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    layer, generator = made.model.layers[0], torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (D,), generator=generator) * 2.0 - 1
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        rows = made.model.embed_tokens.weight  # of norm 8, which RMSNorm leaves as they are
        rows[A, 0] = rows[B, 1] = 8
        rows[QUESTION, 2], rows[QUESTION, 3] = -1, 63**0.5
        layer.self_attn.k_proj.weight.normal_(generator=generator)
        layer.self_attn.v_proj.weight[:, 0], layer.self_attn.v_proj.weight[:, 1] = signs * 1.5 / 8, signs * 0.5 / 8
        layer.self_attn.o_proj.weight[2] = signs / D
        made.lm_head.weight[A, 2], made.lm_head.weight[B, 2], made.lm_head.weight[QUESTION, 3] = 1, -1, -1
    return made.to(device, torch.bfloat16).eval()


def context(length: int, more: int) -> torch.Tensor:
    """54 % of token `more`, 46 % of the other, shuffled, and the question."""
    tokens = torch.full((length - 1,), more)
    tokens[: int(0.46 * length)] = A + B - more
    order = torch.randperm(length - 1, generator=torch.Generator().manual_seed(1))
    return torch.cat([tokens[order], torch.tensor([QUESTION])])[None]


def answer(made: LlamaForCausalLM, name: str, tokens: torch.Tensor) -> int:
    made.set_attn_implementation(name)
    with torch.no_grad(), attention.always():
        return int(made(tokens.to(made.device), use_cache=False, logits_to_keep=1).logits.argmax())


def unflushed(values: torch.Tensor) -> float:
    """The mean of values [S] by sums of 32 at a time onto one that keeps 14 bits, the rest cut off."""
    total = 0.0
    for part in values.double().split(32):
        total += float(part.sum())
        step = 2.0 ** (torch.tensor(total).frexp().exponent.item() - 14)
        total = total // step * step
    return total / len(values)


@pytest.mark.parametrize("more", [A, B])
@pytest.mark.parametrize("name", ["sdpa", "quantlab_int8", "quantlab_fp8"])
def test_counts_its_context(name: str, more: int):
    assert answer(model("cpu"), name, context(2048, more)) == more


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("name", ["sdpa", "quantlab_int8", "quantlab_fp8"])
def test_counts_128k_tokens(name: str):
    made = model("cuda")
    assert [answer(made, name, context(131072, more)) for more in (A, B)] == [A, B]


def test_sums_that_are_not_flushed_answer_wrongly():
    values = torch.where(context(131072, A)[0, :-1] == A, 1.5, 0.5)
    assert values.mean() > 1.035
    assert unflushed(values) < 1
    assert unflushed(values[:4096]) > 1
