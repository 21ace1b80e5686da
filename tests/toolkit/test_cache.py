"""The quantized KV cache through transformers' `generate`: 16-bit codes change nothing, others what they say."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from quantlab import cache, masks
from quantlab.cache import KV
from quantlab.cache_layers import DynamicPackedLayer, Handle, StaticPackedLayer, WindowPackedLayer
from quantlab.errors import PreflightError, UsageError

VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 63,
}  # fmt: skip
WINDOW = {"head_dim": 16, "sliding_window": 8}
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},  # biases
    "Qwen3": {"head_dim": 32},  # norms of q and k
    "Gemma2": {**WINDOW, "query_pre_attn_scalar": 16},  # windows in every other layer, soft cap
    "Gemma3Text": WINDOW,
    "Mistral": {"sliding_window": 8},
    "GPTNeoX": {"rotary_pct": 0.5},
    "Cohere": {},  # interleaved pairs
    "GptOss": {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks
}
FORMATS = ("fp8", "int8", "int4", "k8v4")


def tiny(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **ARCHITECTURES[name], **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(rows=2, length=13, padded=4):
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :padded], ids[0, :padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, tokens=8, **options):
    given = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    found = model.generate(**inputs, max_new_tokens=tokens, **given, **options)
    return found, torch.stack(found.logits, 1)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_16_bit_codes_generate_says_what_it_says_without(name, implementation):
    """Left padding, windows that the text outgrows, soft caps, sinks: the whole path but the rounding."""
    model, inputs = tiny(name), prompts()
    expected, logits = generate(model, inputs)
    cache.use(model, "16bit")
    found, ours = generate(model, inputs, cache_implementation=implementation)
    assert isinstance(found.past_key_values, cache.PackedCache)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(ours, logits, atol=2e-6, rtol=0)
    assert not any(layer.irregular for layer in found.past_key_values.layers)


@pytest.mark.parametrize("kv", ["16bit", "int4"])  # of so few tokens INT4 reads all in 16 bits
@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])  # the second has windows alone, of fewer tokens than a piece
def test_a_prompt_may_come_in_pieces(name, implementation, kv):
    model, inputs = tiny(name), prompts(length=40)
    _, expected = generate(model, inputs)
    cache.use(model, kv)
    found = generate(model, inputs, cache_implementation=implementation, prefill_chunk_size=18, disable_compile=True)
    torch.testing.assert_close(found[1], expected, atol=2e-6, rtol=0)


def test_a_static_cache_says_how_many_tokens_there_were():
    layer = StaticPackedLayer(KV("int8"), 8)
    handle, _ = layer.update(*2 * [torch.zeros(1, 1, 3, 16)])
    before = layer.get_seq_length()
    handle.attend(torch.zeros(1, 1, 3, 16), None, None, {})
    assert (int(before), int(layer.get_seq_length())) == (0, 3)


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_dynamic_and_static_caches_hold_the_same(format):
    model = cache.use(tiny("Qwen2"), format)
    dynamic, static = (generate(model, prompts(), cache_implementation=i) for i in (None, "static"))
    torch.testing.assert_close(dynamic[1], static[1], atol=1e-5, rtol=0)
    a, b = dynamic[0].past_key_values.layers[0], static[0].past_key_values.layers[0]
    assert isinstance(a, DynamicPackedLayer)
    assert isinstance(b, StaticPackedLayer)
    tokens = a.tokens
    assert torch.equal(a.cache.k[:, :, :tokens].view(torch.uint8), b.cache.k[:, :, :tokens].view(torch.uint8))


def outlying_keys(tokens=96, d=64, seed=0):
    """Keys as of the models that break INT4: constant channels of 145, drifting ones, and the rest near 1."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(2, 2, tokens, d, generator=generator)
    k[..., 5] += 145
    k[..., 37] -= 90
    k[..., 20] *= 30
    return k, torch.randn(2, 2, tokens, d, generator=generator)


def measured(k):
    flat = k.transpose(0, 1).flatten(1, 2)
    mean = flat.mean(1, keepdim=True)
    return mean[:, 0][None], cache.channel_scale((flat - mean).abs().amax(1)[None])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [DynamicPackedLayer, lambda kv, keys: StaticPackedLayer(kv, 128, keys)])
def test_attention_over_packed_tokens_is_attention_over_dequantized_ones(format, make):
    k, v = outlying_keys()
    layer = make(KV(format), measured(k))
    queries = torch.randn(2, 6, 96, 64, generator=torch.Generator().manual_seed(3))
    layer.update(k[:, :, :90], v[:, :, :90])[0].attend(queries[:, :, :90], None, None, {})
    for token in range(90, 96):
        step = slice(token, token + 1)
        handle, _ = layer.update(k[:, :, step], v[:, :, step])
        out = handle.attend(queries[:, :, step], None, 0.1, {})
        keys, values = (x.double() for x in layer.dequantized(slice(0, token + 1)))
        exact = torch.nn.functional.scaled_dot_product_attention(
            queries[:, :, step].double(), keys, values, scale=0.1, enable_gqa=True
        )
        torch.testing.assert_close(out.double(), exact.transpose(1, 2), atol=1e-4, rtol=1e-4)


def error_of_scores(format, keys):
    k, v = outlying_keys()
    layer = DynamicPackedLayer(KV(format), keys)
    layer.update(k, v)[0].attend(torch.zeros(2, 2, 96, 64), None, None, {})
    back, _ = layer.dequantized(slice(0, 96))
    wrong = back - k
    return (wrong - wrong.mean(2, keepdim=True)).square().mean((0, 1, 2)).sqrt()  # softmax does not see a constant


@pytest.mark.parametrize(("format", "bound"), [("fp8", 0.04), ("int8", 0.02), ("int4", 0.2)])
def test_outlying_channels_leave_the_others_their_precision(format, bound):
    k, _ = outlying_keys()
    ordinary = [i for i in range(64) if i not in (5, 20, 37)]
    with_channels = error_of_scores(format, measured(k))[ordinary].max()
    naive = error_of_scores(format, None)[ordinary].max()
    assert with_channels < bound
    assert format == "fp8" or naive > 5 * with_channels


def test_a_growing_cache_is_not_compiled_anew_for_every_token():
    """Both the prompt and the steps behind it are a graph, until the cache grows by a block."""
    model, graphs = cache.use(tiny("Llama"), "int8"), []
    expected, _ = generate(model, prompts(padded=0))
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    found, _ = generate(model, prompts(padded=0))
    assert len(graphs) == 2
    assert torch.equal(found.sequences, expected.sequences)


def test_memory_is_what_the_format_says():
    k = torch.randn(1, 2, 300, 64)
    for format, per_token in {"fp8": 2 * 2 * 68, "int8": 2 * 2 * 68, "int4": 2 * 2 * 36, "k8v4": 2 * (68 + 36)}.items():
        layer = DynamicPackedLayer(KV(format))
        layer.update(k, k)
        assert layer.cache.bytes_per_token == per_token
        assert layer.cache.capacity == 512  # blocks of 256
        held = (layer.cache.k, layer.cache.v, layer.cache.k_scale, layer.cache.v_scale)
        assert sum(t.numel() * t.element_size() for t in held) == 512 * per_token
    window = WindowPackedLayer(KV("int8"), 32)
    window.update(k, k)
    assert window.cache.capacity == 32


def test_few_bits_keep_first_and_newest_tokens_in_16_bits():
    assert all((KV.of(name).first, KV.of(name).newest) == (4, 64) for name in ("fp8", "k8v4", "int4"))
    assert KV.of("int8").newest == 0
    k, v = outlying_keys()
    layer = DynamicPackedLayer(KV("int4", 4, 64))
    layer.update(k[:, :, :95], v[:, :, :95])[0].attend(torch.zeros(2, 2, 95, 64), None, None, {})
    q = torch.zeros(2, 2, 1, 64)
    out = layer.update(k[:, :, 95:], v[:, :, 95:])[0].attend(q, None, None, {})  # the mean of what is read
    back = layer.dequantized(slice(0, 96))[1]
    expected = torch.cat((v[:, :, :4], back[:, :, 4:32], v[:, :, 32:]), 2).mean(2)
    torch.testing.assert_close(out[:, 0], expected, atol=1e-5, rtol=0)


LAYERS = {
    "growing": DynamicPackedLayer,
    "static": lambda kv, keys: StaticPackedLayer(kv, 128, keys),
    "window": lambda kv, keys: WindowPackedLayer(kv, 40, keys),
}


@pytest.mark.parametrize("prefill", ["exact", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_many_tokens_see_near_ones_in_16_bits_and_others_by_their_codes(kind, prefill):
    """Behind 60 tokens, the first 8 and 50 of which are padding: of the latter row all that is left is near."""
    k, v = outlying_keys(tokens=80)
    layer, queries = LAYERS[kind](KV("int4", 4, 16, prefill), measured(k)), torch.zeros(2, 2, 60, 64)
    past, _ = layer.update(k[:, :, :60], v[:, :, :60])
    layer.start.copy_(torch.tensor([8, 50]))
    past.attend(queries, None, None, {})
    begin = 21 if kind == "window" else 0
    place = torch.arange(begin, 60)
    codes = layer.dequantized(place % layer.cache.capacity)
    more, _ = layer.update(k[:, :, 60:], v[:, :, 60:])
    assert more.attend(queries[:, :, :20], None, None, {}) is None
    rank = place - torch.tensor([[8], [50]])
    near = ((rank >= 0) & ((rank < 4) | (place >= 44)))[:, None, :, None]
    for found, rounded, x in zip(more.dense(None)[:2], codes, (k, v), strict=True):
        old, new = found[:, :, : 80 - begin].split([60 - begin, 20], 2)
        assert torch.equal(old, torch.where(near, x[:, :, begin:60], rounded) if prefill == "exact" else rounded)
        assert torch.equal(new, x[:, :, 60:]) == (prefill == "exact")


@pytest.mark.parametrize("make", [DynamicPackedLayer, lambda kv, keys: WindowPackedLayer(kv, 128, keys)])
@pytest.mark.parametrize("newest", [0, 8])
def test_a_crop_forgets_the_last_tokens(newest, make):
    k, v = outlying_keys()
    query = torch.randn(2, 2, 1, 64, generator=torch.Generator().manual_seed(4))

    def filled(tokens):
        layer = make(KV("int8", 0, newest), measured(k))
        layer.update(k[:, :, :tokens], v[:, :, :tokens])[0].attend(torch.zeros(2, 2, tokens, 64), None, None, {})
        return layer

    cropped, short = filled(96), filled(40)
    cropped.crop(-56)
    assert cropped.get_seq_length() == 40
    outs = [x.update(k[:, :, 40:41], v[:, :, 40:41])[0].attend(query, None, 0.05, {}) for x in (cropped, short)]
    torch.testing.assert_close(
        *outs, atol=0.05 if newest else 1e-6, rtol=0
    )  # what had left the newest comes back rounded


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_crop_of_everything_forgets_padding_too(name):
    model, inputs = cache.use(tiny(name), "16bit"), prompts(length=7)
    past, fresh = cache.new_cache(model), cache.new_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=past)
        past.crop(-7)
        assert past.get_seq_length() == 0
        for ids in (inputs["input_ids"], torch.tensor([[5], [6]])):
            logits = [model(input_ids=ids, past_key_values=x).logits for x in (past, fresh)]
            assert torch.equal(*logits)


def test_beams_reorder_and_repeat_the_cache():
    for name in ("Llama", "Mistral"):
        model, inputs = tiny(name), prompts()
        expected, _ = generate(model, inputs, num_beams=3)
        for implementation in (None, "static"):
            found, _ = generate(cache.use(model, "16bit"), inputs, num_beams=3, cache_implementation=implementation)
            assert torch.equal(found.sequences, expected.sequences)
            cache.use(model, None)


def test_batch_changes_move_every_tensor_of_a_sequence():
    k, v = outlying_keys()
    for format in FORMATS:
        layer = DynamicPackedLayer(KV(format, 2, 8))
        layer.update(k, v)[0].attend(torch.zeros(2, 2, 96, 64), None, None, {})
        before = layer.dequantized(slice(0, 96))
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
        layer.batch_select_indices(torch.tensor([True, False, False, True]))
        for old, new in zip(before, layer.dequantized(slice(0, 96)), strict=True):
            assert torch.equal(new, old[[1, 1]])
        assert layer.cache.k_near.shape[0] == len(layer.length) == 2


def test_prompt_lookup_takes_back_what_was_not_accepted():
    model, inputs = tiny("Qwen3"), prompts(rows=1, padded=0)
    inputs["input_ids"] = inputs["input_ids"].repeat(1, 3)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
    cache.use(model, KV("16bit"))
    found = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_conversation_continues_on_its_cache(name):
    """A second prompt of many tokens on a filled cache: old ones come back dequantized, windows in their order."""
    model = tiny(name)
    first, more = prompts(rows=1, padded=0), torch.randint(3, 60, (1, 40))

    def talk(given):
        options = {"past_key_values": given, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        answer = torch.cat((model.generate(**first, **options), more), 1)
        return model.generate(answer, attention_mask=torch.ones_like(answer), **options)

    expected = talk(DynamicCache(config=model.config))
    cache.use(model, "16bit")
    assert torch.equal(talk(cache.new_cache(model)), expected)


def test_masks_that_are_more_than_left_padding_go_another_way_and_are_right():
    model, inputs = tiny("Llama"), prompts()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1).contiguous()  # padding on the right
    inputs["attention_mask"][1, 3] = 0  # and a hole
    _, logits = generate(model, inputs)
    for implementation in (None, "static"):
        found, ours = generate(cache.use(model, "16bit"), inputs, cache_implementation=implementation)
        assert all(layer.irregular for layer in found.past_key_values.layers)
        torch.testing.assert_close(ours, logits, atol=2e-6, rtol=0)
        cache.use(model, None)


@pytest.mark.parametrize("kv", ["16bit", "int4"])  # of so few tokens INT4 reads all in 16 bits
@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])  # one with windows
@pytest.mark.parametrize("tokens", [1, 4, 20])  # a step, few over packed tokens, many over dequantized ones
def test_later_masks_may_hide_what_the_first_showed(tokens, name, implementation, kv):
    model, inputs = tiny(name), prompts(length=13, padded=0)
    ids = torch.cat((inputs["input_ids"], torch.randint(3, 60, (2, tokens + 1))), 1)
    place = torch.arange(ids.shape[1]).expand(2, -1)

    @torch.no_grad()
    def logits(past, hidden):
        mask, calls = torch.ones_like(ids), ((0, 13), (13, 13 + tokens), (13 + tokens, 14 + tokens))
        found = []
        for begin, end in calls:
            given = {"input_ids": ids[:, begin:end], "position_ids": place[:, begin:end]}
            found.append(model(**given, attention_mask=mask[:, :end], past_key_values=past).logits)
            mask[0, hidden] = 0  # in the second call and the third
        return torch.cat(found, 1)

    hidden = [slice(0, 10), slice(11, 12)]
    expected = [logits(DynamicCache(config=model.config), x) for x in hidden]
    cache.use(model, kv)
    for x, theirs in zip(hidden, expected, strict=True):
        past = StaticCache(config=model.config, max_cache_len=40) if implementation else cache.new_cache(model)
        past = cache.prepared(model).like(past) if implementation else past
        torch.testing.assert_close(logits(past, x), theirs, atol=2e-6, rtol=0)


def test_steps_whose_mask_hides_padding_alone_go_over_packed_tokens():
    for name in ("Llama", "Mistral"):
        for implementation in (None, "static"):
            given = {"cache_implementation": implementation, "disable_compile": True}
            found, _ = generate(cache.use(tiny(name), "int8"), prompts(), tokens=12, **given)
            assert not any(layer.irregular for layer in found.past_key_values.layers)


def padded_steps(model, call):
    """Logits of the last of a left-padded prompt and of two steps, over a static cache."""
    past = cache.prepared(model).like(StaticCache(config=model.config, max_cache_len=24))
    inputs = prompts()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    ids = torch.cat((inputs["input_ids"], torch.tensor([[5, 6], [7, 8]])), 1)
    place, found = (mask.cumsum(1) - 1).clamp(min=0), []
    for begin, end in ((0, 13), (13, 14), (14, 15)):
        given = {"input_ids": ids[:, begin:end], "position_ids": place[:, begin:end], "attention_mask": mask[:, :end]}
        with torch.no_grad():  # strides that differ from step to step would be compiled anew
            out = call(**{name: x.contiguous() for name, x in given.items()}, past_key_values=past)
        found.append(out.logits[:, -1])
    assert [layer.start.tolist() for layer in past.layers] == [[4, 0]] * 2
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])  # one with windows
def test_a_compiled_forward_learns_where_padding_ends(name):
    model = cache.use(tiny(name), "int8")
    expected = padded_steps(model, model)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    found = padded_steps(model, torch.compile(model, fullgraph=True, backend=graphs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert name == "Gemma2" or graphs.frame_count == 2, "a prompt and a step"


@pytest.mark.parametrize("implementation", [None, "static"])
def test_padding_of_a_prompt_that_is_read_one_token_at_a_time(implementation):
    model = tiny("Llama")
    _, logits = generate(model, prompts())
    _, ours = generate(cache.use(model, "16bit"), prompts(), cache_implementation=implementation, prefill_chunk_size=1)
    torch.testing.assert_close(ours, logits, atol=2e-6, rtol=0)


def test_leading_padding_is_what_does_not_see_itself():
    rows = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    seen = rows[:, None, None] & torch.ones(4, 6).tril().bool()[:, :4]
    seen = torch.nn.functional.pad(seen, (0, 2))  # slots of a static cache
    window = seen & torch.ones(4, 6).triu(-1).bool()
    for mask in (rows, seen, window, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)):
        assert masks.leading_padding(mask, 4).tolist() == [2, 0, 4, 1]


@pytest.mark.parametrize("tokens", [1, 4, 20])
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=40)])
def test_gradients_of_new_tokens_reach_their_keys(make, tokens):
    """As over transformers' own cache that was filled without gradients."""
    ids, found = prompts(length=32)["input_ids"], []
    for kv in (None, "16bit"):
        model = cache.use(tiny("Qwen3"), kv).train()
        past = cache.prepared(model).like(make(config=model.config)) if kv else DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :12], past_key_values=past)
        model(ids[:, 12 : 12 + tokens], past_key_values=past).logits.square().sum().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_loops_that_forget_no_grad_are_not_slower(monkeypatch):
    """Few tokens are attended to as without gradients; whoever asks for these is told, and not given a part of them."""
    model, ids = cache.use(tiny("Llama"), "16bit"), prompts(length=9)["input_ids"]
    past = cache.new_cache(model)
    model(ids[:, :7], past_key_values=past)
    monkeypatch.setattr(Handle, "dense", None)
    logits = model(ids[:, 7:], past_key_values=past).logits
    with pytest.raises(UsageError, match="no gradients outside of training"):
        logits.sum().backward()


def test_prompts_attend_to_what_the_cache_will_hold_if_asked_to():
    k, v = outlying_keys()
    for prefill in ("exact", "packed"):
        layer = DynamicPackedLayer(KV("int4", prefill=prefill), measured(k))
        handle, _ = layer.update(k, v)
        assert handle.attend(torch.zeros(2, 2, 96, 64), None, None, {}) is None
        key, value, _ = handle.dense(None)
        back = layer.dequantized(slice(0, 96))
        expected = (k, v) if prefill == "exact" else back
        torch.testing.assert_close((key, value), expected, atol=1e-5, rtol=1e-5)


def test_a_reset_cache_is_empty():
    model = cache.use(tiny("Gemma2"), "int8")
    found, _ = generate(model, prompts())
    kept = found.past_key_values
    kept.reset()
    assert kept.get_seq_length() == 0
    again = model.generate(**prompts(), past_key_values=kept, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(again, found.sequences)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_a_reset_growing_cache_takes_another_batch(name):
    model = cache.use(tiny(name), "16bit")
    past, ids = cache.new_cache(model), prompts(length=9)["input_ids"]
    model(ids, past_key_values=past)
    past.reset()
    logits = [model(ids[:1], past_key_values=x).logits for x in (past, cache.new_cache(model))]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=40)])
def test_what_inference_mode_has_cached_is_read_and_changed_outside_of_it(name, make):
    model, ids = cache.use(tiny(name), "int4"), prompts(length=20)["input_ids"]

    def last(change, mode):
        past = cache.prepared(model).like(make(config=model.config))
        with mode():
            model(ids[:, :7], past_key_values=past)
        with torch.no_grad():
            change(past)
            few = model(ids[:, 7:8], past_key_values=past).logits
            return torch.cat((few, model(ids[:, 8:], past_key_values=past).logits), 1)

    swap = lambda past: past.reorder_cache(torch.tensor([1, 0]))  # noqa: E731
    crop = lambda past: make is DynamicCache and past.crop(-2)  # noqa: E731
    for change in (lambda past: None, swap, crop, Cache.reset):
        assert torch.equal(last(change, torch.inference_mode), last(change, torch.no_grad))


def test_a_model_can_be_given_back_its_own_cache():
    model = tiny("Llama")
    cache.use(model, "int8")
    assert cache.prepared(model).kv == KV("int8")
    cache.use(model, "none")
    assert cache.prepared(model) is None
    assert type(generate(model, prompts())[0].past_key_values) is DynamicCache
    assert type(cache.new_cache(model)) is DynamicCache


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: KV("int3"), "unknown KV format 'int3'"),
        (lambda: KV("int8", -1), "first = -1, newest = 0: needs numbers of tokens, 0 or more"),
        (lambda: KV("int8", prefill="no"), "prefill = 'no'"),
        (lambda: cache.use(tiny_t5(), "int8"), "T5ForConditionalGeneration cannot have a quantized KV cache"),
        (lambda: update(DynamicPackedLayer(KV("int8")), batch=0), "an empty batch"),
        (lambda: update(DynamicPackedLayer(KV("int8")), d_value=32), "needs them alike"),
        (lambda: update(DynamicPackedLayer(KV("int4")), d=33, d_value=33), "needs an even number"),
        (lambda: update(StaticPackedLayer(KV("int8"), 8)), "9 tokens for a static cache of 8"),
        (lambda: update(DynamicPackedLayer(KV("int8"), (torch.zeros(1, 3, 64),) * 2)), "statistics of (3, 64)"),
        (lambda: update(DynamicPackedLayer(KV("int8"))).softmax, "the model asks cached keys for 'softmax'"),
        (lambda: torch.chunk(update(DynamicPackedLayer(KV("int8"))), 2), "the model asks cached keys for 'chunk'"),
        (lambda: DynamicPackedLayer(KV("int8")).offload(), "leave out offloading"),
        (lambda: cache.PackedCache.like(DynamicCache(), "int8", {}), "give it the model's config"),
        (lambda: cache.PackedCache.like(SimpleNamespace(offloading=True), "int8"), "give one without offloading"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, text):
    with pytest.raises(UsageError) as error:
        make()
    assert text in str(error.value)


def update(layer, batch=1, d=64, d_value=64):
    handle, _ = layer.update(torch.zeros(batch, 2, 9, d), torch.zeros(batch, 2, 9, d_value))
    assert isinstance(handle, Handle)
    return handle


def tiny_t5():
    config = transformers.T5Config(vocab_size=16, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MiniMax", "it has a cache of its own (MiniMaxCache)"),
        ("Llama4Text", "its attention is chunked"),
        ("Mamba", "its attention does not go through transformers' interface"),
        ("Bert", "it is no decoder that generates"),
        ("Zaya", "its cache has layers of kind LinearAttentionAndFullAttentionLayer"),
        ("DiffLlama", "its attention (DiffLlamaAttention) computes on cached keys or values"),
        ("Doge", "its attention (DogeAttention) computes on cached keys or values"),
    ],
)
def test_models_whose_cache_is_another_are_refused_before_any_work(name, reason, tmp_path):
    config = getattr(transformers, f"{name}Config")(**{**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1})
    with torch.device("meta"):
        model = (
            transformers.AutoModel.from_config(config) if name == "Bert" else AutoModelForCausalLM.from_config(config)
        )
    with pytest.raises(UsageError) as error:
        cache.use(model, "int8")
    assert f"{type(model).__name__} cannot have a quantized KV cache: {reason}; leave out kv" in str(error.value)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    with pytest.raises(PreflightError) as refusal:
        cache.require_support(tmp_path, "int8")
    assert f"the model cannot have a quantized KV cache: {reason}; leave out kv" in str(refusal.value)


def test_other_kinds_of_caches_are_refused():
    model = cache.use(tiny("Llama"), "int8")
    for implementation in ("offloaded", "offloaded_static"):
        with pytest.raises(UsageError, match=f"'{implementation}': the quantized cache stays on its GPU; leave it out"):
            generate(model, prompts(), cache_implementation=implementation)
    with pytest.raises(UsageError, match="'quantized' is transformers' own"):
        generate(model, prompts(), cache_implementation="quantized")
    with pytest.raises(UsageError, match="an empty batch"):
        model.generate(torch.zeros(0, 4, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)


def test_attention_that_is_no_longer_ours_is_refused():
    model = cache.use(tiny("Llama"), "int8")
    model.set_attn_implementation("eager")
    with pytest.raises(UsageError, match=r"attn_implementation is 'eager' now.*quantlab\.cache\.use\(model, None\)"):
        generate(model, prompts())
    with pytest.raises(UsageError, match=r"the model asks cached keys for '\[\]'"):
        model(**prompts(), past_key_values=cache.new_cache(model))
    cache.use(model, None)
    assert type(generate(model, prompts())[0].past_key_values) is DynamicCache


def test_position_biases_and_changed_batches_are_refused():
    layer = DynamicPackedLayer(KV("int8"))
    handle = update(layer)
    with pytest.raises(UsageError, match="position bias"):
        handle.attend(torch.zeros(1, 2, 9, 64), None, None, {"position_bias": torch.zeros(1)})
    with pytest.raises(UsageError, match="a batch of 3 for a cache of 1"):
        update(layer, batch=3)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"head_dim": 32}])
def test_a_cache_of_another_model_is_refused(changes):
    past, other = cache.new_cache(cache.use(tiny("Llama"), "int8")), cache.use(tiny("Llama", **changes), "int8")
    past.update(*2 * [torch.zeros(2, 2, 3, 16)], 0)
    with pytest.raises(UsageError, match="for a cache of 2 of 16: it belongs to another model"):
        other(prompts()["input_ids"], past_key_values=past)


def test_windows_cannot_be_taken_back():
    layer = WindowPackedLayer(KV("int8"), 8)
    update(layer).attend(torch.zeros(1, 2, 9, 64), None, None, {})
    with pytest.raises(UsageError, match="sliding window cannot be taken back"):
        layer.crop(-2)


def test_mask_sizes_are_those_of_transformers():
    model = tiny("Gemma2")
    for theirs in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        ours = cache.PackedCache.like(theirs, "16bit", {})
        k = torch.zeros(1, 2, 5, 16)
        for _ in range(4):
            for i, layer in enumerate(ours.layers):
                if isinstance(theirs, DynamicCache) or not layer.is_sliding:
                    assert ours.get_mask_sizes(5, i) == theirs.get_mask_sizes(5, i)
                theirs.update(k, k, i)
                layer.update(k, k)[0].attend(torch.zeros(1, 4, 5, 16), None, None, {})
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_new_cache_serves_calls_of_the_model_itself():
    model = cache.use(tiny("Qwen2"), "16bit")
    ids = torch.randint(3, 60, (2, 40))
    expected = model(ids, use_cache=False).logits
    filled: Cache = cache.new_cache(model)
    parts = [model(part, past_key_values=filled).logits for part in ids.split(7, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-6, rtol=0)
