"""8-bit attention in models of several kinds against their own eager attention; what it cannot do is said, and right.

A wrong mask moves the hidden states of these models by a quarter and more, 8 bits by one to four percent.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
)

from quantlab import attention, masks
from quantlab.attention import AttentionFallback
from quantlab.cache import use
from quantlab.errors import UsageError
from quantlab_kernels.attention_prefill import op as prefill

SIZES = {
    "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 128, "head_dim": 64, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(2, 24, dtype=torch.long).index_put((torch.tensor([1] * 7), torch.arange(7)), torch.tensor(0))


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """8 bits at any length; every reason is said anew."""
    monkeypatch.setenv("QUANTLAB_ATTENTION_MIN_TOKENS", "0")
    monkeypatch.setattr(attention, "_said", set())


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Numbers of queries of the calls that ran in 8 bits."""
    seen: list[int] = []

    def counted(q, *args, **kwargs):
        seen.append(q.shape[2])
        return prefill.attention_8bit(q, *args, **kwargs)

    monkeypatch.setattr(attention, "attention_8bit", counted)
    return seen


def causal_model(kind: str, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def hidden(model: torch.nn.Module, name: str, tokens: torch.Tensor = TOKENS, **kwargs) -> torch.Tensor:
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(tokens, output_hidden_states=True, **kwargs).hidden_states[-1]


def close(found: torch.Tensor, exact: torch.Tensor, where: torch.Tensor | None = None, bound: float = 0.06) -> None:
    if where is not None:
        found, exact = found[where.bool()], exact[where.bool()]
    assert (found - exact).norm() < bound * exact.norm(), float((found - exact).norm() / exact.norm())


KINDS = [
    ("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 5}), ("gemma2", {"sliding_window": 5}),
    ("gpt_neox", {"rotary_pct": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_causal_models(kind: str, sizes: dict, codes: str, calls):
    model = causal_model(kind, **sizes)
    exact = hidden(model, "eager")
    close(hidden(model, f"quantlab_{codes}"), exact)
    assert calls == [24, 24]
    exact = hidden(model, "eager", attention_mask=LEFT)
    close(hidden(model, f"quantlab_{codes}", attention_mask=LEFT), exact, LEFT)
    right = LEFT.flip(1)
    exact = hidden(model, "eager", attention_mask=right)
    close(hidden(model, f"quantlab_{codes}", attention_mask=right), exact, right)
    assert calls == [24] * 6


def test_sinks(calls):
    model = causal_model("gpt_oss", num_local_experts=2, num_experts_per_tok=1, sliding_window=5)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, 1.0)
    exact = hidden(model, "eager", attention_mask=LEFT)
    close(hidden(model, "quantlab_int8", attention_mask=LEFT), exact, LEFT)
    assert calls == [24, 24]
    found = hidden(model, "quantlab", attention_mask=LEFT)
    torch.testing.assert_close(found[LEFT.bool()], exact[LEFT.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_16_bits_are_the_same(kind: str, sizes: dict, calls):
    model = causal_model(kind, **sizes)
    for mask in (None, LEFT):
        exact = hidden(model, "eager", attention_mask=mask)
        found = hidden(model, "quantlab", attention_mask=mask)
        where = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(found[where], exact[where], rtol=1e-4, atol=1e-4)
    assert calls == []


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_generation(kind: str, cache: str, calls):
    model = causal_model(kind, **({"sliding_window": 5} if kind == "gemma2" else {}))
    options = {"attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(TOKENS, **options)
    for name in ("quantlab", "quantlab_int8"):
        model.set_attn_implementation(name)
        logits = model.generate(TOKENS, output_logits=True, return_dict_in_generate=True, **options)
        if name == "quantlab":
            assert torch.equal(logits.sequences, expected)
    assert calls == [24, 24], "the prompt in 8 bits, single queries in 16"


def test_a_second_piece_of_the_prompt(calls):
    model = causal_model("llama")
    exact = hidden(model, "eager", attention_mask=LEFT)
    model.set_attn_implementation("quantlab_int8")
    with torch.no_grad():
        first = model(TOKENS[:, :10], attention_mask=LEFT[:, :10], use_cache=True)
        position = torch.arange(10, 24)[None]
        second = model(
            TOKENS[:, 10:], attention_mask=LEFT, past_key_values=first.past_key_values, position_ids=position,
            output_hidden_states=True,
        )  # fmt: skip
    assert calls == [10, 10, 14, 14]
    close(second.hidden_states[-1], exact[:, 10:], LEFT[:, 10:])


@pytest.mark.parametrize("padding", [None, LEFT])
def test_a_prompt_in_pieces_in_a_static_cache(padding):
    """The cache counts its tokens in place, before a mask that is made late is asked for."""
    model = causal_model("llama")
    exact = hidden(model, "sdpa", attention_mask=padding)
    model.set_attn_implementation("quantlab")
    kept = StaticCache(config=model.config, max_cache_len=40)
    given = {"past_key_values": kept, "output_hidden_states": True}
    with torch.no_grad():
        first, second = (
            model(
                TOKENS[:, piece], position_ids=torch.arange(24)[None, piece],
                attention_mask=None if padding is None else padding[:, : piece.stop], **given,
            ).hidden_states[-1]
            for piece in (slice(0, 10), slice(10, 24))
        )  # fmt: skip
        kept.reset()
        again = model(TOKENS, attention_mask=padding, **given).hidden_states[-1]
    close(torch.cat([first, second], 1), exact, padding, 1e-5)
    close(again, exact, padding, 1e-5)


@pytest.mark.parametrize("pieces", [5, 9])
def test_windows_of_a_static_cache_whose_prompt_generate_reads_in_pieces(pieces):
    """`generate` makes the mask and the model reads it again, as padding."""
    model = causal_model("mistral", sliding_window=8)
    given = {"attention_mask": LEFT, "max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    exact = model.generate(TOKENS, **given, do_sample=False, pad_token_id=0).logits
    model.set_attn_implementation("quantlab")
    given |= {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": pieces}
    found = model.generate(TOKENS, **given, do_sample=False, pad_token_id=0).logits
    close(torch.stack(found), torch.stack(exact), bound=1e-5)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_on_the_gpu(codes: str, calls):
    """16-bit models, padded and not, a prompt and a few tokens after it."""
    model = causal_model("llama", head_dim=128).to("cuda", torch.bfloat16)
    tokens, mask = TOKENS.cuda(), LEFT.cuda()
    for given in (None, mask):
        exact = hidden(model, "eager", tokens, attention_mask=given)
        close(hidden(model, f"quantlab_{codes}", tokens, attention_mask=given), exact, given)
    assert calls == [24] * 4
    out = model.generate(tokens, attention_mask=mask, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 28)
    assert calls == [24] * 6


def test_packed_sequences(calls):
    model = causal_model("llama")
    tokens, lengths = TOKENS[:1], (5, 12, 7)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    exact = torch.cat([hidden(model, "eager", part) for part in tokens.split(lengths, 1)], 1)
    close(hidden(model, "quantlab_int8", tokens, position_ids=position, use_cache=False), exact)
    assert calls == [24, 24]


def test_not_causal_and_cross_attention(calls):
    torch.manual_seed(0)
    vision = AutoModel.from_config(
        AutoConfig.for_model(
            "vit",
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        vision.set_attn_implementation("eager")
        exact = vision(image).last_hidden_state
        vision.set_attn_implementation("quantlab_int8")
        close(vision(image).last_hidden_state, exact)
    assert calls == [17, 17]
    calls.clear()
    pair = AutoModel.from_config(
        AutoConfig.for_model(
            "bart",
            d_model=128,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=99,
        )
    ).eval()
    with torch.no_grad():
        inputs = {"input_ids": TOKENS, "attention_mask": LEFT.flip(1), "decoder_input_ids": TOKENS[:, :9]}
        pair.set_attn_implementation("eager")
        exact = pair(**inputs).last_hidden_state
        pair.set_attn_implementation("quantlab_int8")
        close(pair(**inputs).last_hidden_state, exact)
    assert calls == [24, 9, 9]


def test_compiles_to_one_graph():
    model = causal_model("llama")
    exact = hidden(model, "eager")
    model.set_attn_implementation("quantlab_int8")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = compiled(TOKENS, output_hidden_states=True, use_cache=False).hidden_states[-1]
        padded = compiled(TOKENS, attention_mask=LEFT, output_hidden_states=True, use_cache=False).hidden_states[-1]
    close(plain, exact)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        exact = model(TOKENS, attention_mask=LEFT, output_hidden_states=True, use_cache=False).hidden_states[-1]
    close(padded, exact, LEFT)


def test_what_cannot_be_in_8_bits_says_so_once(calls, monkeypatch):
    model = causal_model("llama")
    exact = hidden(model, "eager", attention_mask=LEFT)
    holes = LEFT.clone()
    holes[0, 4] = 0
    with pytest.warns(AttentionFallback, match="quantlab_int8: attention in 16 bits, because the mask is more than"):
        found = hidden(model, "quantlab_int8", attention_mask=holes)
    torch.testing.assert_close(found[1, 7:], exact[1, 7:], rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden(model, "quantlab_int8", attention_mask=holes)
    monkeypatch.setenv("QUANTLAB_ATTENTION_MIN_TOKENS", "1000")
    with pytest.warns(AttentionFallback, match="24 queries and 24 keys are too few to be faster"):
        found = hidden(model, "quantlab_int8", attention_mask=LEFT)
    torch.testing.assert_close(found[LEFT.bool()], exact[LEFT.bool()], rtol=1e-4, atol=1e-4)
    monkeypatch.delenv("QUANTLAB_ATTENTION_MIN_TOKENS")
    attention._said.clear()
    with pytest.warns(AttentionFallback, match="not seen to be faster with heads of 64 channels"):
        hidden(model, "quantlab_int8")
    least = attention.FASTER_FROM[128]
    with pytest.warns(AttentionFallback, match=rf"too few to be faster \(from {least} keys on they are\)"):
        hidden(causal_model("llama", head_dim=128), "quantlab_int8")
    with pytest.warns(AttentionFallback, match="gradients are asked for"):
        model(TOKENS).logits.sum().backward()
    with pytest.warns(AttentionFallback, match="heads of 32 and 32 channels; there are kernels for 64, 80"):
        hidden(causal_model("llama", head_dim=32), "quantlab_int8")
    assert calls == []


def test_plain_attention_by_pieces(monkeypatch):
    q, k, v = (torch.randn(2, heads, 9, 16) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    monkeypatch.setattr(attention, "_PLAIN_ELEMENTS", 150)
    found = attention.plain(q, k, v, None, True, None, None, None)
    torch.testing.assert_close(found.transpose(1, 2), expected)
    bias = torch.randn(1, 4, 9, 9)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(attention.plain(q, k, v, bias, False, None, None, None).transpose(1, 2), expected)


def test_a_mask_that_lost_its_description(calls):
    """As after a move to another GPU: the padding and the module's own word on windows are left."""
    q, k, v = (torch.randn(2, heads, 24, 64) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    run = attention._function("quantlab_int8", "int8")
    for window in (None, 5):
        found, _ = run(module, q, k, v, LEFT.bool(), sliding_window=window)
        place = torch.arange(24)
        seen = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - (window or 99))
        seen = seen[None, None] & LEFT.bool()[:, None, None]
        exact = attention.plain(q, k, v, seen, False, None, None, None)
        close(found, exact, LEFT)
    assert calls == [24, 24]


def test_masks_that_are_known():
    from transformers import masking_utils as hf

    assert masks.limits_of(hf.causal_mask_function) == masks.Limits(-1, 0)
    assert masks.limits_of(hf.sliding_window_causal_mask_function(4)) == masks.Limits(3, 0)
    assert masks.limits_of(hf.sliding_window_bidirectional_mask_function(4)) == masks.Limits(4, 4)
    assert masks.limits_of(hf.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))) is None
    assert masks.limits_of(hf.or_masks(hf.causal_mask_function, hf.bidirectional_mask_function)) is None
    assert masks.limits_of(lambda b, h, q, k: k <= q) is None


def test_grouped_queries_take_our_name_and_write_the_same():
    model = causal_model("llama")
    model.set_attn_implementation("sdpa")
    given = {"attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False}
    caches = (None, "static")
    plain = [model.generate(TOKENS, cache_implementation=cache, **given) for cache in caches]
    assert attention.share_keys(model)
    assert model.config._attn_implementation == "quantlab"
    for cache, expected in zip(caches, plain, strict=True):
        assert torch.equal(model.generate(TOKENS, cache_implementation=cache, **given), expected)


def test_continuous_batching_keeps_its_own_attention():
    model = causal_model("llama")
    model.set_attn_implementation("sdpa")
    attention.share_keys(model)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    given = {"inputs": TOKENS.tolist(), "generation_config": settings, "continuous_batching_config": small}
    found = model.generate_batch(**given, warmup=False)
    assert model.config._attn_implementation == "quantlab"
    expected = model.generate(TOKENS, max_new_tokens=3, do_sample=False, eos_token_id=-1)[:, 24:]
    assert [found[name].generated_tokens for name in sorted(found)] == expected.tolist()
    use(model, "int8")
    with pytest.raises(UsageError, match="pages of its own"):
        model.generate_batch(**given)


def test_whose_name_stays():
    eager = causal_model("llama")
    assert not attention.share_keys(eager)
    one_query_a_key = causal_model("llama", num_key_value_heads=4)
    one_query_a_key.set_attn_implementation("sdpa")
    assert not attention.share_keys(one_query_a_key)
    assert not attention.share_keys(torch.nn.Linear(2, 2))
    masks_itself = causal_model("doge")
    masks_itself.set_attn_implementation("sdpa")
    assert not attention.share_keys(masks_itself)
    assert one_query_a_key.config._attn_implementation == "sdpa"


def test_measuring_in_one_thread_is_nothing_to_another(monkeypatch, calls):
    model = causal_model("llama")
    monkeypatch.setenv("QUANTLAB_ATTENTION_MIN_TOKENS", "1000")
    with attention.always(), ThreadPoolExecutor(1) as other:
        with pytest.warns(AttentionFallback, match="too few"):
            other.submit(hidden, model, "quantlab_int8").result()
        assert calls == []
        hidden(model, "quantlab_int8")
    assert calls == [24, 24]


def test_measuring_goes_before_the_environment(monkeypatch, calls):
    model = causal_model("llama")
    monkeypatch.setenv("QUANTLAB_ATTENTION_MIN_TOKENS", "1000")
    with attention.always():
        hidden(model, "quantlab_int8")
    assert calls == [24, 24]
    monkeypatch.setenv("QUANTLAB_ATTENTION_MIN_TOKENS", "many")
    with pytest.raises(UsageError, match="MIN_TOKENS='many': needs a number of keys"):
        hidden(model, "quantlab_int8")
