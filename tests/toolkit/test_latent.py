"""Latent attention through transformers' `generate`: absorbed decoding says what expanded decoding says."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import quantlab
from quantlab import cache, latent, latent_step
from quantlab.cache import KV
from quantlab.errors import UsageError
from quantlab.latent import DynamicLatentLayer, StaticLatentLayer
from quantlab.scheme import Recipe
from quantlab_calib.rotate import hadamard
from quantlab_kernels.common.latent import dequantize_latent, quantize_latent

COMMON = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 63, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
ARCHITECTURES = {
    "DeepseekV2": {},
    "DeepseekV3": {},  # interleaved pairs
    "AXK1": {},
    "Youtu": {},
    "Glm4MoeLite": {},
    "MiniCPM3": {},
    "LongcatFlash": {  # latents times a constant
        "head_dim": 16, "num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_size": 32, "moe_topk": 2,
        "zero_expert_num": 1,
    },
    "Mistral4": {"head_dim": 32},  # queries times a function of their position
}  # fmt: skip
SPARSE = ("AXK2", "HYV4", "DeepseekV32", "GlmMoeDsa")


def tiny(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **ARCHITECTURES.get(name, {}), **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def prompts(rows=2, length=13, padded=4):
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :padded], ids[0, :padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, tokens=6, **options):
    given = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    found = model.generate(**prompts(), max_new_tokens=tokens, **given, **options)
    return found, torch.stack(found.logits, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_absorbed_is_expanded(name):
    """float32, left padding, several steps, growing and static."""
    model = tiny(name)
    expected, logits = generate(model)
    cache.use(model, "16bit")
    for implementation, kind in ((None, DynamicLatentLayer), ("static", StaticLatentLayer)):
        found, ours = generate(model, cache_implementation=implementation)
        assert all(type(layer) is kind for layer in found.past_key_values.layers)
        assert not any(layer.irregular for layer in found.past_key_values.layers)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(ours, logits, atol=5e-6, rtol=1e-5)
    cache.use(model, None)
    assert torch.equal(generate(model)[0].sequences, expected.sequences)


@pytest.mark.parametrize(("chunk", "turned"), [(5, False), (8, True), (40, False), (40, True)])
def test_chunks_on_both_sides_of_the_crossover(chunk, turned):
    """Absorbed up to it, expanded from it on, with latents that are turned as they come too."""
    model = tiny("DeepseekV3")
    attention = next(latent.modules(model))
    ids = torch.randint(3, 60, (2, 60), generator=torch.Generator().manual_seed(2))
    expected = model(ids).logits
    cache.use(model, "16bit")
    if turned:
        for module in latent.modules(model):
            module.quantlab_absorbed = latent.Absorbed(module, hadamard(32))
    past = cache.new_cache(model)
    begin = model(ids[:, :20], past_key_values=past).logits
    rest = torch.cat([model(ids[:, i : i + chunk], past_key_values=past).logits for i in range(20, 60, chunk)], 1)
    torch.testing.assert_close(torch.cat((begin, rest), 1), expected, atol=5e-6, rtol=1e-5)
    assert 5 <= attention.quantlab_absorbed.crossover < 60


@torch.no_grad()
def test_static_caches_expand_what_growing_ones_do():
    """So many that they are expanded: both read new ones as they came."""
    model, found = cache.use(tiny("DeepseekV3"), "fp8"), []
    ids = torch.randint(3, 60, (2, 60), generator=torch.Generator().manual_seed(2))
    static = transformers.StaticCache(config=model.config, max_cache_len=64)
    for past in (cache.new_cache(model), cache.prepared(model).like(static)):
        model(ids[:, :5], past_key_values=past)
        found.append(model(ids[:, 5:], past_key_values=past).logits)
    torch.testing.assert_close(*found, atol=5e-6, rtol=1e-5)


def test_crossover_is_computed():
    """DeepSeek-V3 and GLM: 170 and 398 queries; expanding never pays where latents are small."""
    assert latent.crossover(nope=128, v=128, latent=512) == 170
    assert latent.crossover(nope=192, v=256, latent=512) == 398
    assert latent.crossover(nope=64, v=64, latent=64) == 1 << 30


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steps_are_short(name, monkeypatch):
    """What `test_absorbed_is_expanded` compares is not the model's own forward, but where that does more."""
    model = cache.use(tiny(name), "fp8")
    own = name in ("LongcatFlash", "Mistral4")
    module = next(latent.modules(model))
    assert isinstance(module.forward, latent_step.Step) != own
    taken = []
    for kind in ("step", "prompt"):
        usual = getattr(latent_step.Step, kind)
        counted = lambda *given, usual=usual, kind=kind, **more: taken.append(kind) or usual(*given, **more)  # noqa: E731
        monkeypatch.setattr(latent_step.Step, kind, counted)
    generate(model, tokens=5)
    layers = 0 if own else model.config.num_hidden_layers
    assert (taken.count("prompt"), taken.count("step")) == (layers, 4 * layers)
    cache.use(model, None)
    assert not any("forward" in vars(module) for module in latent.modules(model))


@torch.no_grad()
def test_masks_of_steps_may_hide_what_the_prompt_showed():
    model, ids = tiny("DeepseekV2"), prompts()["input_ids"]
    mask, given = torch.ones(2, 14).long(), {"input_ids": ids[:, :1], "position_ids": torch.full((2, 1), 13)}
    mask[0, 3] = 0

    def last():
        past = cache.new_cache(model)
        model(input_ids=ids, past_key_values=past)
        return model(**given, attention_mask=mask, past_key_values=past).logits

    expected = last()
    cache.use(model, "16bit")
    torch.testing.assert_close(last(), expected, atol=2e-5, rtol=0)


def test_joined_projections_are_left_when_they_change():
    """The same numbers from one GEMM; not past an adapter, a hook, or weights that were moved."""
    model = cache.use(tiny("DeepseekV2", q_lora_rank=None), "fp8")
    module = next(latent.modules(model))
    first, second, step = module.q_proj, module.kv_a_proj_with_mqa, module.forward
    assert step.join.is_of(first, second)
    assert first.weight.data_ptr() == step.join.weight.data_ptr()
    x = torch.randn(2, 1, 64)
    with torch.no_grad():
        query, row = step.projected(x)
        torch.testing.assert_close(query.flatten(-2), first(x))
        torch.testing.assert_close(row, second(x))
        second.weight.mul_(2)
        torch.testing.assert_close(step.projected(x)[1], 2 * row)
    hook = first.register_forward_hook(lambda *given: None)
    assert not step.join.is_of(first, second)
    hook.remove()
    assert not step.join.is_of(torch.nn.Sequential(first), second)
    model.double()
    assert not step.join.is_of(first, second)
    assert step.projected(x.double())[0].dtype == torch.float64
    model.load_state_dict(tiny("DeepseekV2", q_lora_rank=None).state_dict())


def test_few_tokens_have_gradients_in_training_alone():
    plain, model = tiny("DeepseekV3"), cache.use(tiny("DeepseekV3"), "16bit")
    ids = prompts()["input_ids"]

    def backward(model, past):
        with torch.no_grad():
            model(ids, past_key_values=past)
        model(ids[:, :2], past_key_values=past).logits.square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    expected = backward(plain.train(), transformers.DynamicCache(config=plain.config))
    torch.testing.assert_close(backward(model.train(), cache.new_cache(model)), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="no gradients outside of training"):
        backward(model.eval(), cache.new_cache(model))


class Adapter(torch.nn.Module):
    """A projection and another of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features = base, base.in_features
        self.beside = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.beside(x)


def adapted(model):
    torch.manual_seed(2)
    for module in latent.modules(model):
        module.kv_b_proj = Adapter(module.kv_b_proj)
    return model


def trained(model):
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    model(**prompts()).logits.square().sum().backward()
    optimizer.step()
    return model


def loaded(model):
    torch.manual_seed(2)
    model.load_state_dict({name: x + 0.05 * torch.randn_like(x) for name, x in model.state_dict().items()})
    return model


@pytest.mark.parametrize("change", [adapted, trained, loaded, torch.nn.Module.half])
def test_expansions_that_change_are_read_anew(change):
    expected = generate(change(tiny("DeepseekV3")))[1]
    model = change(cache.use(tiny("DeepseekV3"), "16bit"))
    atol = 2e-6 if model.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(generate(model)[1], expected, atol=atol, rtol=0)
    assert not torch.allclose(expected, generate(tiny("DeepseekV3"))[1], atol=1e-5)


def test_turned_latents_follow_the_dtype():
    model = tiny("DeepseekV3").bfloat16()
    for module in latent.modules(cache.use(model, "16bit")):
        module.quantlab_absorbed = latent.Absorbed(module, hadamard(32))
    expected = generate(tiny("DeepseekV3"))[1]
    model.float().load_state_dict(tiny("DeepseekV3").state_dict())
    torch.testing.assert_close(generate(model)[1], expected, atol=2e-5, rtol=0)


def test_what_inference_mode_has_cached_is_read_outside_of_it():
    model, ids = cache.use(tiny("DeepseekV3"), "int8"), prompts()["input_ids"]
    logits = []
    for mode in (torch.inference_mode, torch.no_grad):
        past = cache.new_cache(model)
        with mode():
            model(ids, past_key_values=past)
        with torch.no_grad():
            logits.append(model(ids[:, :1], past_key_values=past).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("held", [torch.float32, torch.float16])
@pytest.mark.parametrize("kv", ["16bit", "fp8", "int8", "int4"])
def test_steps_take_the_dtype_of_autocast(kv, held):
    plain, model = (tiny("DeepseekV3", first_k_dense_replace=2) for _ in range(2))
    plain, model = plain.to(held), cache.use(model, kv).to(held)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (generate(x, tokens=3)[1] for x in (plain, model))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert all(module.quantlab_absorbed.keys.dtype == held for module in latent.modules(model))


def relative(x, y):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


def held(model):
    """What the layers hold after a prompt: latents and position parts."""
    found, _ = generate(model, tokens=2)
    return [layer.dequantized(slice(4, layer.tokens)) for layer in found.past_key_values.layers]


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_latents_of_formats(name):
    """FP8 within 3 %; the position part stays as it is, bit for bit."""
    model = tiny(name)
    for format, bound in (("fp8", 0.03), ("int8", 0.01)):
        first = held(cache.use(model, format))[0]
        exact = held(cache.use(model, "16bit"))[0]  # in a model that INT8 has turned
        assert relative(first[0], exact[0]) < bound
        assert torch.equal(first[1], exact[1])


def test_int4_turned_loses_no_more_than_groups_of_64():
    """Latents with channels of outliers: turned with one scale, against a scale per 64 channels as they are."""
    x = torch.randn(500, 512, generator=torch.Generator().manual_seed(0))
    groups = x.unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    of_groups = relative((groups / scale).round() * scale, groups)
    x[:, torch.arange(8) * 60] *= 20
    turned = x @ hadamard(512).float()
    back = dequantize_latent(*quantize_latent(turned, "int4", torch.float32), torch.float32)
    assert relative(back, turned) < 1.1 * of_groups
    assert relative(dequantize_latent(*quantize_latent(x, "int4", torch.float32), torch.float32), x) > 1.5 * of_groups


@torch.no_grad()
def read(model, ids, step=16):
    """Log-probabilities of a text read in steps, all of it out of the cache."""
    past = cache.new_cache(model)
    steps = [model(part, past_key_values=past).logits for part in ids.split(step, 1)]
    return torch.cat(steps, 1).log_softmax(-1)


def test_logits_of_formats(monkeypatch):
    """KL in nats of random weights with eight latent channels of 20 times the size; see the README of mla_decode."""
    sizes = {
        "hidden_size": 256, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "vocab_size": 256, "first_k_dense_replace": 2, "initializer_range": 0.07, "q_lora_rank": None,
    }  # fmt: skip
    model = tiny("DeepseekV2", **sizes)
    for module in latent.modules(model):
        module.kv_a_layernorm.weight.data[::64] *= 20
        module.kv_b_proj.weight.data *= 0.5
    ids = torch.randint(256, (1, 160), generator=torch.Generator().manual_seed(4))
    exact = read(cache.use(model, "16bit"), ids)

    def kl(format):
        found = read(cache.use(model, KV(format, prefill="packed")), ids)
        return float((exact.exp() * (exact - found)).sum(-1).mean())

    with monkeypatch.context() as context:  # as they are
        context.setattr(latent, "_fold", lambda module: True)
        plain = {format: kl(format) for format in ("fp8", "int8", "int4")}
    turned = {format: kl(format) for format in ("int8", "int4")}
    assert plain["fp8"] < 0.002
    assert turned["int8"] < 0.0003 < plain["int8"]
    assert turned["int4"] < 0.04 < plain["int4"] / 5


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3", "LongcatFlash"])
def test_turning_is_folded(name):
    """In float64 the product of the projections, with the norm's weights between them, is what it was."""
    model = tiny(name, attention_bias=True)
    for module in latent.modules(model):
        torch.nn.init.normal_(module.kv_a_layernorm.weight, 1.0, 0.3)
    ids = prompts()["input_ids"]
    expected, module = model(ids).logits, next(latent.modules(model))
    old = copy.deepcopy(module).double()
    new = copy.deepcopy(old)
    assert latent._fold(new)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before, after = (m.kv_a_proj_with_mqa(x)[:, :32] for m in (old, new))
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), atol=0, rtol=1e-12)
    expanded = old.kv_b_proj(before * old.kv_a_layernorm.weight)
    torch.testing.assert_close(new.kv_b_proj(after), expanded, atol=1e-12, rtol=1e-10)
    assert torch.equal(new.kv_a_proj_with_mqa(x)[:, 32:], old.kv_a_proj_with_mqa(x)[:, 32:])
    for kv in ("int4", "int4", None):  # once is enough, and it stays
        cache.use(model, kv)
        assert not torch.equal(module.kv_b_proj.weight, old.kv_b_proj.weight.float())
        torch.testing.assert_close(model(ids).logits, expected, atol=5e-6, rtol=1e-5)
    cache.use(model, "int4")
    assert module.quantlab_absorbed.turn is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A DeepSeek-V3 whose projections are FP8 in blocks."""
    folder = tmp_path_factory.mktemp("latent")
    sizes = {
        "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "kv_lora_rank": 128,
        "q_lora_rank": 128, "qk_nope_head_dim": 64, "v_head_dim": 64, "qk_rope_head_dim": 32,
    }  # fmt: skip
    tiny("DeepseekV3", **sizes).save_pretrained(folder / "source")
    quantlab.quantize(folder / "source", "fp8-block", folder / "fp8")
    return folder / "fp8"


@pytest.mark.parametrize(("format", "bound"), [("16bit", 0.05), ("fp8", 0.05), ("int4", 0.15)])
def test_quantized_projections(checkpoint, format, bound):
    """Absorbed from the dequantized weight; INT4 turns each latent as it comes."""
    plain = quantlab.load(checkpoint, dtype=torch.float32)
    ids = prompts(padded=0)["input_ids"]
    expected = plain(ids).logits[:, -1:]
    model = quantlab.load(checkpoint, dtype=torch.float32, kv=format)
    module = next(latent.modules(model))
    assert type(module.kv_b_proj).__name__ == "Fp8BlockLinear"
    assert (module.quantlab_absorbed.turn is not None) == (format == "int4")
    weight = module.kv_b_proj.dequantize().unflatten(0, (4, -1))
    if format != "int4":
        assert torch.equal(module.quantlab_absorbed.keys, weight[:, :64])
    past = cache.new_cache(model)
    model(ids[:, :-1], past_key_values=past)
    assert relative(model(ids[:, -1:], past_key_values=past).logits, expected) < bound


def absorb(model, codes):
    for module in latent.modules(model):
        module.quantlab_absorbed = latent.Absorbed(module, codes=codes)
        assert module.quantlab_absorbed.codes == codes
        assert (module.quantlab_absorbed.keys is None) == codes


def last(model):
    """Logits of a decoding step."""
    ids = prompts(padded=0)["input_ids"].to(model.device)
    past = cache.new_cache(model)
    model(ids[:, :-1], past_key_values=past)
    return model(ids[:, -1:], past_key_values=past).logits


def test_codes_of_the_projection_are_the_matrices(checkpoint):
    """Absorbed by what FP8 codes stand for: the dequantized matrices' results, also once a weight has changed."""
    model = quantlab.load(checkpoint, dtype=torch.float32, kv="16bit")
    assert not any(module.quantlab_absorbed.codes for module in latent.modules(model)), "a CPU has no kernel for it"
    before = last(model)
    absorb(model, codes=True)
    torch.testing.assert_close(last(model), before, atol=1e-4, rtol=1e-4)
    model.load_state_dict({n: -t if "kv_b_proj.weight_scale" in n else t for n, t in model.state_dict().items()})
    after = last(model)
    assert relative(after, before) > 0.01
    absorb(model, codes=False)
    torch.testing.assert_close(last(model), after, atol=1e-4, rtol=1e-4)


def test_codes_that_are_not_all_of_the_expansion_are_not_multiplied(checkpoint, monkeypatch):
    model = quantlab.load(checkpoint, dtype=torch.float32)
    module = next(latent.modules(model))
    assert latent.Absorbed(module, codes=True).codes
    assert not latent.Absorbed(module, hadamard(128), codes=True).codes
    expand = type(module).expand_kv
    twice = lambda self, latent, rope: expand(self, 2 * latent, rope)  # noqa: E731
    monkeypatch.setattr(type(module), "expand_kv", twice)
    assert not latent.Absorbed(module, codes=True).codes


def test_a_recipe_keeps_the_format_and_preflight_knows_it(checkpoint, tmp_path):
    source = checkpoint.parent / "source"
    with pytest.raises(UsageError, match="kv=k8v4: latents are keys and values at once"):
        quantlab.quantize(source, Recipe(kv="k8v4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantlab.quantize(source, Recipe(kv="fp8"), tmp_path / "out")
    assert cache.prepared(quantlab.load(tmp_path / "out")).latent


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_attention_is_refused(name):
    with torch.device("meta"):
        model = tiny(name)
    with pytest.raises(UsageError, match="picks the tokens that it attends to"):
        cache.use(model, "fp8")


def test_what_latents_do_not_have_is_refused():
    model = tiny("DeepseekV2")
    with pytest.raises(UsageError, match="kv=k8v4: latents are keys and values at once; there are fp8, int8, int4"):
        cache.use(model, "k8v4")
    with pytest.raises(UsageError, match="all latents are kept alike"):
        cache.use(model, KV("int4", first=4, newest=64))
    cache.use(model, "fp8")
    with pytest.raises(UsageError, match="offloaded"):
        generate(model, cache_implementation="offloaded")
    layer = DynamicLatentLayer(KV("fp8"))
    with pytest.raises(UsageError, match="needs a latent and a part for the position, alike for all heads"):
        layer.update(torch.zeros(1, 4, 3, 32), torch.zeros(1, 4, 3, 24))
    handle, _ = DynamicLatentLayer(KV("fp8")).update(torch.zeros(1, 1, 3, 32), torch.zeros(1, 1, 3, 16))
    with pytest.raises(UsageError, match="came to attention without `expand_kv`"):
        handle.attend(torch.zeros(1, 4, 3, 32), None, None, {})
    with pytest.raises(UsageError, match="attention is given s_aux, which attention over packed latents lacks"):
        handle.attend(torch.zeros(1, 4, 3, 32), None, None, {"s_aux": torch.zeros(4)})


def test_an_expansion_that_is_not_known_is_refused(monkeypatch):
    """The check is of numbers: names and shapes are as always here."""
    model = tiny("DeepseekV3")
    kind = type(next(latent.modules(model)))
    own = kind.expand_kv
    monkeypatch.setattr(kind, "expand_kv", lambda self, a, b: own(self, a * a.abs(), b))
    with pytest.raises(UsageError, match="expands latents in a way not known"):
        cache.use(model, "fp8")
    monkeypatch.setattr(kind, "expand_kv", lambda self, a, b: own(self, a, b.flip(-1)))
    with pytest.raises(UsageError, match="expands latents in a way not known"):
        cache.use(model, "fp8")


def test_keys_that_are_expanded_before_they_are_cached_are_refused():
    class Early(torch.nn.Module):
        def forward(self, x, past_key_values):
            keys, values = self.expand_kv(x, x)
            return past_key_values.update(keys, values, 0)

        def expand_kv(self, a, b):
            return a, b

    assert latent.unsupported(Early()) == (
        "this version of transformers caches keys and values of every head, not latents"
    )
    assert latent.unsupported(torch.nn.Linear(1, 1)) == "this version of transformers does not cache its latents"


def test_beams_and_crops():
    model = cache.use(tiny("DeepseekV2"), "fp8")
    found, _ = generate(model, tokens=2)
    layer = found.past_key_values.layers[0]
    rows = layer.dequantized(slice(4, 10))[0].clone()
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.dequantized(slice(4, 10))[0], rows.flip(0))
    layer.crop(-3)
    assert layer.tokens == int(layer.length[0]) == 11
    generate(model, num_beams=2)
    ids = torch.randint(3, 60, (1, 300), generator=torch.Generator().manual_seed(2))
    past = cache.new_cache(model)
    model(ids[:, :250], past_key_values=past)
    model(ids[:, 250:], past_key_values=past)
    assert past.layers[0].cache.capacity == 512


@pytest.mark.parametrize("codes", [False, True])
def test_a_decoding_step_compiles_whole(checkpoint, codes):
    if codes:
        model = quantlab.load(checkpoint, dtype=torch.float32, kv="fp8")
        absorb(model, codes=True)
    else:
        model = cache.use(tiny("DeepseekV3"), "fp8")
    ids = prompts(padded=0)["input_ids"]
    with torch.no_grad():
        static = transformers.StaticCache(config=model.config, max_cache_len=32)
        past, compiled = (cache.prepared(model).like(static) for _ in range(2))
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        for cached in (past, compiled):
            model(ids, past_key_values=cached)
        position = torch.tensor([[13], [13]])
        given = {"input_ids": ids[:, :1], "position_ids": position}
        expected = model(**given, past_key_values=past).logits
        found = step(**given, past_key_values=compiled).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_forward_learns_where_padding_ends():
    model = cache.use(tiny("DeepseekV2"), "fp8")
    _, expected = generate(model, tokens=2, cache_implementation="static")
    model.forward = torch.compile(model.forward, backend="aot_eager")
    _, found = generate(model, tokens=2, cache_implementation="static")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize(("format", "bound"), [("16bit", 0.02), ("fp8", 0.03), ("int8", 0.02), ("int4", 0.08)])
@pytest.mark.parametrize("implementation", [None, "static"])
@torch.no_grad()
def test_on_the_gpu(format, bound, implementation):
    """Kernels of real sizes in a model's hands: logits of all steps until texts part."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    model = tiny("DeepseekV2", first_k_dense_replace=2, **sizes).to("cuda", torch.bfloat16)
    ids = torch.randint(3, 60, (2, 300), generator=torch.Generator().manual_seed(2)).cuda()
    expected = model(ids).logits[:, -20:]
    cache.use(model, format)
    shape = transformers.StaticCache(config=model.config, max_cache_len=320)
    past = cache.new_cache(model) if implementation is None else cache.prepared(model).like(shape)
    begin = ids.shape[1] - 20
    model(ids[:, :begin], past_key_values=past)
    steps = [model(ids[:, begin + i : begin + i + 1], past_key_values=past).logits for i in range(20)]
    assert relative(torch.cat(steps, 1), expected) < bound


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(sm=80))])
@torch.no_grad()
def test_the_norm_of_latents_is_the_same_and_is_taken_back(device):
    model = tiny("DeepseekV2").to(device, torch.bfloat16)
    norm = next(latent.modules(model)).kv_a_layernorm
    norm.weight.uniform_(0.5, 2)
    x = torch.randn(2, 3, len(norm.weight), device=device, dtype=torch.bfloat16)
    expected = norm(x)
    cache.use(model, "fp8")
    assert "forward" in vars(norm)
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=2**-6 if device == "cuda" else 0)
    cache.use(model, None)
    assert "forward" not in vars(norm)


@pytest.mark.gpu(sm=80)
def test_codes_are_multiplied_on_the_gpu(checkpoint):
    """Logits of a step as with the dequantized matrices, but for their rounding."""
    model = quantlab.load(checkpoint, dtype=torch.bfloat16, kv="16bit").to("cuda")
    cache.use(model, "16bit")
    assert all(module.quantlab_absorbed.codes for module in latent.modules(model))
    by_codes = last(model)
    absorb(model, codes=False)
    assert relative(by_codes, last(model)) < 0.02


def test_models_without_latents_are_what_they_were():
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = cache.use(AutoModelForCausalLM.from_config(config), "int8")
    assert not cache.prepared(model).latent
