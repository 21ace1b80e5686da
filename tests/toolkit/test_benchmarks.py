"""Whole-job benchmarks: the checkpoint they make, what their runs do, what they refuse."""

from __future__ import annotations

import time

import pytest
import torch

import quantlab
from quantlab import benchmarks, latent_benchmark, moe_benchmark
from quantlab.errors import UsageError


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "tiny"
    total = benchmarks.make_checkpoint(benchmarks.SHAPES["tiny"], folder, device="cpu")
    assert total == sum(p.numel() * 2 for p in quantlab.load(folder).parameters())
    return folder


def test_a_model_with_experts_is_made(tmp_path):
    """Latent attention and experts, in layers that are quantized and run on ours."""
    total = benchmarks.make_checkpoint(benchmarks.SHAPES["tiny-experts"], tmp_path / "tiny", device="cpu")
    assert total == sum(p.numel() * 2 for p in quantlab.load(tmp_path / "tiny").parameters())
    quantlab.quantize(tmp_path / "tiny", "fp8-block", tmp_path / "fp8")
    model = quantlab.load(tmp_path / "fp8", kv="fp8")
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"Fp8BlockExperts", "Fp8BlockLinear"} <= kinds
    with torch.inference_mode():
        assert benchmarks._decode_ms(model, torch.randint(3, 512, (2, 10)), steps=2) > 0


@pytest.mark.parametrize("kv", [None, "int8"])
def test_decoding_is_timed_over_steps_in_a_static_cache(random_llama, kv: str | None, monkeypatch):
    model = quantlab.load(random_llama, kv=kv).eval()
    read, caches, forward = [], set(), model.forward

    def spy(*args, **kwargs):
        read.append(kwargs["input_ids"].shape[1])
        caches.add(all(layer.is_compileable for layer in kwargs["past_key_values"].layers))
        time.sleep(0.02 if len(read) > 40 and read[-1] == 1 else 0.001)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    with torch.inference_mode():
        ms = benchmarks._decode_ms(model, torch.randint(3, 512, (2, 40)), steps=8)
    assert read == ([40] + [1] * 23) * 2
    assert caches == {True}
    assert ms >= 20


def test_cases():
    assert benchmarks.case_of("decode 16x2048") == ("decode", 16, 2048)
    for text in ("decode", "decode 0x4", "prefill 4", "train 1x1", "decode 1x2 "):
        with pytest.raises(UsageError, match="needs 'prefill BxS' or 'decode BxS'"):
            benchmarks.case_of(text)
    with pytest.raises(UsageError, match="case 'fast'"):
        benchmarks.generation("tiny", "fp8-block", None, cases=["fast"])


def test_latent_attention_is_two_rooms_and_a_layer():
    _, header, rows = benchmarks.kernel_room("mla", dry_run=True)
    assert header == ("case",)
    names = {"fp8 128x1", "int4 h16 128x4096", "deepseek-v2-lite layer fp8 16x4096"}
    assert names <= {name for (name,) in rows}


@torch.no_grad()
def test_a_layer_is_timed_over_its_next_token():
    """Our steps lengthen the cache, transformers' begin anew, and both say nearly the same of the first."""
    theirs, ours = latent_benchmark.their_step(2, 8, "cpu"), latent_benchmark.ours_step("16bit", 2, 8, "cpu")
    first = theirs()
    torch.testing.assert_close(theirs(), first)
    assert ((ours() - first).norm() / first.norm()).item() < 0.02
    assert not torch.equal(ours(), first)


@pytest.mark.gpu(sm=90)
@torch.no_grad()
def test_layers_are_timed(monkeypatch):
    monkeypatch.setattr(latent_benchmark, "TOKENS", 64)
    rows = list(latent_benchmark.run())
    assert [row[0] for row in rows] == [latent_benchmark.case(name) for name in latent_benchmark.FORMATS]
    assert all(float(row[2]) > 0 and "transformers bf16" in row[-1] for row in rows)


def test_experts_are_two_rooms_and_whole_layers():
    _, header, rows = benchmarks.kernel_room("moe", dry_run=True)
    assert header == ("case",)
    assert {"8x64 deepseek-v3.gate_up", "deepseek-v3 experts int4-fp8 M=128"} <= {name for (name,) in rows}


@pytest.mark.gpu(sm=80)
def test_experts_of_a_layer_are_timed(monkeypatch):
    monkeypatch.setattr(moe_benchmark, "LAYERS", {"tiny": moe_benchmark.TINY})
    monkeypatch.setattr(moe_benchmark, "TOKENS", (2,))
    rows = list(moe_benchmark.run())
    assert [row[0] for row in rows] == [f"tiny experts {name} M=2" for name in moe_benchmark.FORMATS]
    assert all(float(row[2]) > 0 and "grouped_mm" in row[-1] for row in rows)


def test_attention_lists_both_rooms_and_the_error_report():
    _, header, rows = benchmarks.kernel_room("attention", dry_run=True)
    assert header == ("case",)
    assert {("4x4096 16/16x128",), ("4x4k causal",), ("outliers 64",), ("128 keys, values of mean 1",)} <= set(rows)
    with pytest.raises(UsageError, match="did you mean 'attention'"):
        benchmarks.kernel_room("atention", dry_run=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_generation_needs_a_gpu():
    with pytest.raises(UsageError, match="timed on a GPU, and there is none here"):
        benchmarks.generation("tiny", "fp8-block", None)
