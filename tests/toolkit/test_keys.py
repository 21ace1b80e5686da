"""Key statistics beside a checkpoint: measured by `quantize`, carried, checked, and never used for other weights."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantlab
from quantlab import cache, hf, keys
from quantlab.checkpoint import KEY_STATISTICS, MANIFEST, RECIPE
from quantlab.convert import convert
from quantlab.errors import UsageError, VerificationError
from quantlab.pipeline import quantize
from quantlab.scheme import Recipe
from quantlab.verify import verify
from quantlab_calib import rope

COMMON = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 2},  # biases
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 32},  # norms of q and k
    "Gemma3Text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "Phi": {"partial_rotary_factor": 0.5},
    "GPTNeoX": {"rotary_pct": 0.5},
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, character_tokenizer: Callable[..., Any]) -> Make:
    """The folder of a small model by the name of its architecture."""

    @once
    def make(name: str) -> Path:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**COMMON, **ARCHITECTURES[name])
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter_name, parameter in made.named_parameters():
            if parameter_name.endswith(("k_proj.bias", "query_key_value.bias")):
                parameter.data.normal_(0, 8)
        folder = tmp_path_factory.mktemp(name)
        made.save_pretrained(folder)
        character_tokenizer(bos=True).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def made(model: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """A quantized checkpoint by architecture, scheme and format of the cache."""

    @once
    def make(name: str, scheme: str = "fp8-dynamic", kv: str = "fp8") -> Path:
        folder = tmp_path_factory.mktemp("made") / "out"
        quantize(model(name), Recipe(scheme, kv=kv), folder, device="cpu", workers=1)
        return folder

    return make


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def copied(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def altered(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.fixture
def measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("keys were measured")

    monkeypatch.setattr(rope, "key_statistics", refuse)
    monkeypatch.setattr(rope, "key_statistics_by_block", refuse)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_is_what_the_whole_model_says(name: str, model: Make, made: Any, tmp_path: Path):
    folder = made(name)
    kept, digest = keys.read(folder / KEY_STATISTICS)
    assert digest == keys.digest(folder) != keys.digest(model(name))
    whole = transformers.AutoModelForCausalLM.from_pretrained(model(name), dtype=torch.float32)
    tokens = keys.texts(model(name), whole.config)
    assert tokens.shape == (rope.PIECES, rope.PIECE)
    found = keys.of_statistics(rope.key_statistics(whole, tokens))
    assert kept.keys() == found.keys() == {0, 1}
    for layer, wanted in found.items():
        for ours, theirs in zip(kept[layer], wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert verify(folder).problems == ()
    assert KEY_STATISTICS in (folder / MANIFEST).read_text()


def test_magnitudes_include_the_attention_sink(model: Make, monkeypatch: pytest.MonkeyPatch):
    """The mean leaves the first tokens of a piece out, a scale for all of a tensor must not."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(model("Llama"), dtype=torch.float32)
    tokens = torch.full((4, 32), 7)
    first = rope.key_statistics(whole, tokens)[0]
    tokens[:, 0] = 9
    whole.model.embed_tokens.weight.data[9] *= 1000
    whole.model.layers[0].input_layernorm = torch.nn.Identity()
    loud = rope.key_statistics(whole, tokens)[0]
    assert float(loud.amax[0]) > 100 * float(loud.spread.max() + loud.mean.abs().max())
    assert loud.spread.shape == first.spread.shape == (1, 2, 32)


def test_loading_measures_nothing_and_says_nothing(made: Any, measures_nothing: None):
    folder = made("Qwen2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = hf.load(folder)
    kept, _ = keys.read(folder / KEY_STATISTICS)
    used = cache.prepared(loaded)
    assert used.kv.format == "fp8"
    assert all(torch.equal(a, b) for i in kept for a, b in zip(kept[i], used.keys[i], strict=True))
    out = loaded.generate(torch.tensor([[3, 9, 27]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 7)


def test_latents_need_none(tiny: Callable[[str], Any], tmp_path: Path, measures_nothing: None):
    summary = quantize(tiny("deepseek_v3").folder, Recipe("fp8-dynamic", kv="fp8"), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / KEY_STATISTICS).exists()
    assert not any("keys" in text for text in (*summary.warnings, *summary.calibration))
    assert config_of(tmp_path / "out")["kv_cache_scheme"] is None
    loaded = hf.load(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / KEY_STATISTICS).exists()
    assert cache.prepared(hf.load(tmp_path / "saved")).latent


@pytest.mark.parametrize("why", ["weights", "bias", "place", "another"])
def test_other_weights_are_measured_anew(why: str, made: Any, tmp_path: Path):
    folder = copied(made("Qwen2", "int4", "int8"), tmp_path / "copy")
    kept, _ = keys.read(folder / KEY_STATISTICS)
    if why == "weights":
        altered(folder, lambda t: t["model.layers.1.self_attn.k_proj.weight_packed"].add_(1))
    elif why == "bias":
        altered(folder, lambda t: t["model.layers.0.self_attn.k_proj.bias"].neg_())
    elif why == "place":
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 100.0
        (folder / "config.json").write_text(json.dumps(config))
    else:
        shutil.copy(made("Llama", "int4", "int8") / KEY_STATISTICS, folder / KEY_STATISTICS)
    with pytest.warns(keys.StaleKeysWarning, match="was measured on other weights than these; keys are measured again"):
        loaded = hf.load(folder)
    assert cache.prepared(loaded).keys.keys() == kept.keys()
    found = " ".join(verify(folder).problems)
    assert "key_statistics.safetensors: was measured on other weights; loading measures again" in found
    summary = convert(folder, "bf16", tmp_path / "bf16")
    assert summary.warnings == ("key statistics were measured on other weights and stay behind",)
    assert not (tmp_path / "bf16" / KEY_STATISTICS).exists()


@pytest.mark.parametrize(
    ("scheme", "targets"), [("fp8-block", ("compressed-tensors", "bf16")), ("int4", ("int4-fp8", "bf16"))]
)
def test_conversions_carry_it(
    scheme: str, targets: tuple[str, ...], tiny: Any, with_tokenizer: Any, tmp_path: Path, monkeypatch: Any
):
    source = with_tokenizer("llama").folder
    quantize(source, Recipe(scheme, kv="int4"), tmp_path / "out", device="cpu")
    kept, _ = keys.read(tmp_path / "out" / KEY_STATISTICS)
    monkeypatch.setattr(rope, "key_statistics", None)
    for to in targets:
        convert(tmp_path / "out", to, tmp_path / to)
        found, digest = keys.read(tmp_path / to / KEY_STATISTICS)
        assert digest == keys.digest(tmp_path / to)
        assert all(torch.equal(a, b) for i in kept for a, b in zip(kept[i], found[i], strict=True))
        assert KEY_STATISTICS in (tmp_path / to / MANIFEST).read_text()
        assert cache.prepared(hf.load(tmp_path / to, kv="int4")).keys.keys() == kept.keys()


def test_saving_carries_it(made: Any, tmp_path: Path, measures_nothing: None):
    loaded = hf.load(made("Qwen3"))
    loaded.save_pretrained(tmp_path / "saved")
    assert Recipe.from_toml(tmp_path / "saved" / RECIPE).kv == "fp8"
    assert verify(tmp_path / "saved").problems == ()
    again = hf.load(tmp_path / "saved")
    kept = cache.prepared(loaded).keys
    assert all(torch.equal(a, b) for i in kept for a, b in zip(kept[i], cache.prepared(again).keys[i], strict=True))
    cache.use(again, None)
    again.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / KEY_STATISTICS).exists()


def test_weights_that_were_changed_do_not_take_it_along(model: Make, tmp_path: Path):
    loaded = hf.load(model("Llama"), kv="int8", dtype=torch.float32)
    loaded.to(torch.bfloat16).save_pretrained(tmp_path / "cast")
    assert keys.load(tmp_path / "cast") is not None
    with torch.no_grad():
        loaded.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    with pytest.warns(keys.StaleKeysWarning, match=r"weights were changed since keys were measured.*cache\.use"):
        loaded.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / KEY_STATISTICS).exists()
    cache.use(loaded, "int8")
    loaded.save_pretrained(tmp_path / "trained")
    assert keys.load(tmp_path / "trained") is not None


def test_scales_of_an_fp8_cache(made: Any):
    """One number for all keys of a layer, one for all values: what is largest becomes 448 at most."""
    folder = made("Qwen2")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert scheme.items() <= config_of(folder)["kv_cache_scheme"].items()
    kept, _ = keys.read(folder / KEY_STATISTICS)
    tensors = load_file(folder / "model.safetensors")
    for layer, (_, _, amax) in kept.items():
        for name, largest in zip(("k_scale", "v_scale"), amax, strict=True):
            scale = tensors[f"model.layers.{layer}.self_attn.{name}"]
            assert (scale.dtype, scale.shape) == (torch.bfloat16, (1,))
            assert float(largest) / 448 <= float(scale) <= float(largest) / 448 * (1 + 2**-7)
    assert config_of(made("Qwen2", "fp8-dynamic", "int4"))["kv_cache_scheme"] is None


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "Phi"])
def test_others_take_the_scales(name: str, made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """transformers' own path, without ours: nothing missing, nothing surplus, the scales where they belong."""
    pytest.importorskip("compressed_tensors")
    hf.disable()
    try:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(made(name), output_loading_info=True)
    finally:
        hf.enable()
    assert not any(info.values())
    tensors = load_file(made(name) / "model.safetensors")
    found = {key: value for key, value in loaded.named_parameters() if key.endswith(("k_scale", "v_scale"))}
    assert len(found) == 4
    assert all(torch.equal(value.bfloat16(), tensors[key]) for key, value in found.items())
    out = loaded.generate(torch.tensor([[3, 9, 27]]), max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 5)


def test_ours_hold_the_scales_and_save_them(made: Any, tmp_path: Path):
    folder = made("Gemma3Text", "int4", "fp8")
    hf.load(folder).save_pretrained(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("k_scale"))
    assert config_of(tmp_path / "saved")["kv_cache_scheme"] == config_of(folder)["kv_cache_scheme"]


def test_fp8_has_no_place_for_scales_and_conversions_know(with_tokenizer: Any, tmp_path: Path):
    """transformers complains of tensors beside `fp8` that no layer takes."""
    quantize(with_tokenizer("qwen3").folder, Recipe("fp8-block", kv="fp8"), tmp_path / "fp8", device="cpu")
    assert not any(name.endswith("k_scale") for name in load_file(tmp_path / "fp8" / "model.safetensors"))
    convert(tmp_path / "fp8", "compressed-tensors", tmp_path / "ct")
    assert config_of(tmp_path / "ct")["kv_cache_scheme"]["num_bits"] == 8
    assert sum(name.endswith("_scale") for name in load_file(tmp_path / "ct" / "model.safetensors")) == 14 + 4
    assert verify(tmp_path / "ct").problems == ()
    convert(tmp_path / "ct", "fp8", tmp_path / "back")
    first, second = (tmp_path / name / "model.safetensors" for name in ("fp8", "back"))
    assert first.read_bytes() == second.read_bytes()
    assert convert(tmp_path / "ct", "bf16", tmp_path / "bf16").warnings == ()
    assert not any("scale" in name for name in load_file(tmp_path / "bf16" / "model.safetensors"))
    (tmp_path / "ct" / KEY_STATISTICS).unlink()
    (warning,) = convert(tmp_path / "ct", "fp8", tmp_path / "bare").warnings
    assert warning == "the scales of the KV cache stay behind: this format has no place for them"


def test_attention_that_compressed_tensors_does_not_know_gets_no_scheme(made: Any, model: Make, tmp_path: Path):
    summary = quantize(model("GPTNeoX"), Recipe("fp8-dynamic", kv="fp8"), tmp_path / "out", device="cpu")
    assert "no kv_cache_scheme: compressed-tensors knows no attention like GPTNeoXForCausalLM's" in summary.warnings
    assert config_of(tmp_path / "out")["kv_cache_scheme"] is None
    assert (tmp_path / "out" / KEY_STATISTICS).is_file()


def test_schemes_of_others_are_not_dropped_silently(made: Any, tmp_path: Path):
    folder = copied(made("Llama"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="its kv_cache_scheme is not FP8 per tensor"):
        convert(folder, "bf16", tmp_path / "no")
    with pytest.raises(VerificationError, match="its kv_cache_scheme is not FP8 per tensor"):
        hf.load(folder)


FINDINGS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: [t.pop(f"1.{name}") for name in ("mean", "scale", "amax")], "layer 1 is missing"),
    "surplus": (
        lambda t: t.update({f"7.{name}": t[f"1.{name}"].clone() for name in ("mean", "scale", "amax")}),
        "has layer 7, the model has 2",
    ),
    "heads": (lambda t: t.update({"0.mean": t["0.mean"].reshape(1, 4, 16)}), r"needs two of \[1, 2, 32\]"),
    "nan": (lambda t: t["0.mean"].fill_(float("nan")), "layer 0 has numbers that are not finite"),
    "zero": (lambda t: t["1.scale"].zero_(), "layer 1 has numbers that are not finite, or scales that are not"),
    "magnitudes": (lambda t: t["1.amax"].fill_(-1), "layer 1 has no two largest magnitudes"),
}


@pytest.mark.parametrize("what", FINDINGS)
def test_verify_says_what_is_wrong(what: str, made: Any, tmp_path: Path):
    folder = copied(made("Llama"), tmp_path / "copy")
    change, message = FINDINGS[what]
    altered(folder, change, KEY_STATISTICS)
    (check,) = (c for c in verify(folder).checks if c.name == "key statistics are of these weights")
    assert any(re.search(message, problem) for problem in check.problems), check.problems


def test_verify_knows_the_scales(made: Any, tmp_path: Path):
    def problems(change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
        folder = copied(made("Llama"), tmp_path / "copy")
        (folder / MANIFEST).unlink()
        altered(folder, change)
        found = " ".join(verify(folder).problems)
        shutil.rmtree(folder)
        return found

    key = "model.layers.0.self_attn.k_scale"
    assert f"{key}: is missing" in problems(lambda t: t.pop(key))
    assert f"{key}: is BF16 [2], needs one floating-point number" in problems(
        lambda t: t.update({key: torch.ones(2).bfloat16()})
    )
    assert f"{key}: 1 of 1 scales are not positive and finite" in problems(lambda t: t[key].zero_())


def test_an_interrupted_run_does_not_measure_again(model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from quantlab import stream

    recipe, original = Recipe("int4", kv="fp8"), stream.convert
    calls: list[int] = []
    measure = rope.key_statistics_by_block

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(rope, "key_statistics_by_block", counted)
    monkeypatch.setattr(stream, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model("Llama"), recipe, tmp_path / "out", device="cpu")
    monkeypatch.setattr(stream, "convert", original)
    quantize(model("Llama"), recipe, tmp_path / "out", device="cpu")
    assert calls == [1]
    assert keys.load(tmp_path / "out") is not None
    quantize(model("Llama"), recipe, tmp_path / "straight", device="cpu")
    for name in ("model.safetensors", KEY_STATISTICS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_what_cannot_be_measured_is_measured_at_load(model: Make, tmp_path: Path):
    source = copied(model("Llama"), tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    summary = quantize(source, Recipe("int4", kv="int8"), tmp_path / "out", device="cpu")
    hint, warning = summary.warnings
    assert hint.startswith("INT4 weights are rounded without data")
    assert warning == "keys were not measured, every load does it: no tokenizer that transformers can read"
    assert not (tmp_path / "out" / KEY_STATISTICS).exists()
    assert cache.prepared(hf.load(tmp_path / "out")).keys.keys() == {0, 1}


def test_progress_and_summary(model: Make, tmp_path: Path):
    shown: list[str] = []
    summary = quantlab.quantize(
        model("Llama"), Recipe("int4", kv="fp8"), tmp_path / "out", device="cpu",
        progress=lambda label, *_: shown.append(label),
    )  # fmt: skip
    assert shown[:2] == ["measuring keys of model.layers.0", "measuring keys of model.layers.1"]
    assert summary.calibration["keys"] == "2 layers measured all over the context, and the scales of its FP8 cache"
    assert sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values()) == summary.bytes_after


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"tokens are \[5\] torch.int64: needs \[pieces, length\] int64"),
        (torch.zeros(0, 5, dtype=torch.int64), r"tokens are \[0, 5\]"),
        (torch.zeros(2, 5), "tokens are .* torch.float32"),
        (torch.full((2, 5), 128), "tokens from 128 to 128: the model knows 0 to 127"),
    ],
)
def test_texts_that_do_not_serve(tokens: torch.Tensor, message: str, model: Make):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model("Llama"))
    with pytest.raises(UsageError, match=message):
        cache.use(loaded, "int8", tokens)
    with pytest.raises(UsageError, match=r"unknown KV format 'int5'; .* did you mean 'int8'"):
        cache.use(loaded, "int5")


def test_a_recipe_of_a_cache_alone_says_what_to_do():
    with pytest.raises(UsageError, match=r"quantizes nothing.*quantlab\.load\(MODEL, kv='int8'\)"):
        Recipe("none", kv="int8")


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_does(model: Make, made: Any, tmp_path: Path):
    """In bfloat16 there, in float32 here; and what lies beside the checkpoint is what the cache on the GPU gets."""
    quantize(model("Qwen2"), Recipe("fp8-dynamic", kv="fp8"), tmp_path / "out", device="cuda")
    ours, theirs = (keys.read(folder / KEY_STATISTICS)[0] for folder in (tmp_path / "out", made("Qwen2")))
    for layer, wanted in theirs.items():
        largest = wanted.amax[0]
        assert float((ours[layer].mean - wanted.mean).abs().max()) < 0.01 * largest
        assert float((ours[layer].scale - wanted.scale).abs().max()) < 0.02 * largest
        torch.testing.assert_close(ours[layer].amax, wanted.amax, rtol=0.02, atol=0)
    assert verify(tmp_path / "out").problems == ()
    loaded = hf.load(tmp_path / "out", device_map="cuda")
    tokens = torch.randint(3, 90, (2, 20), device="cuda")
    assert loaded.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 24)
    loaded.save_pretrained(tmp_path / "saved")
    assert keys.load(tmp_path / "saved") is not None
