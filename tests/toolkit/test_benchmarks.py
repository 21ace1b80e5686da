"""Whole-job benchmarks: the checkpoint they make, what their runs do, what they refuse."""

from __future__ import annotations

import fcntl
import operator
import threading
import time
from concurrent.futures import Future

import pytest
import torch

import quantlab
from quantlab import (
    attention_benchmark,
    benchmarks,
    generation_benchmark,
    latent_benchmark,
    moe_benchmark,
    random_models,
)
from quantlab.errors import UsageError
from quantlab_kernels import bench
from quantlab_kernels.attention_prefill import errors
from quantlab_kernels.common import timing

PICKED = {"only": "qwen3", "unchecked": True, "sustained": 0.5}


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "tiny"
    total = random_models.make_checkpoint(random_models.SHAPES["tiny"], folder, device="cpu")
    assert total == sum(p.numel() * 2 for p in quantlab.load(folder).parameters())
    return folder


def test_a_model_with_experts_is_made(tmp_path):
    """Latent attention and experts, in layers that are quantized and run on ours."""
    total = random_models.make_checkpoint(random_models.SHAPES["tiny-experts"], tmp_path / "tiny", device="cpu")
    assert total == sum(p.numel() * 2 for p in quantlab.load(tmp_path / "tiny").parameters())
    quantlab.quantize(tmp_path / "tiny", "fp8-block", tmp_path / "fp8")
    model = quantlab.load(tmp_path / "fp8", kv="fp8")
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"Fp8BlockExperts", "Fp8BlockLinear"} <= kinds
    with torch.inference_mode():
        assert min(generation_benchmark.decode_times(model, torch.randint(3, 512, (2, 10)), steps=2)) > 0


@pytest.mark.parametrize("first", ["config.json", "model-00000.safetensors"])
def test_a_model_that_was_killed_half_made_is_made_again(first: str, tmp_path, monkeypatch):
    """Weights are there before the config is, or behind it where transformers writes them."""

    def killed(shape, folder, *, device):
        folder.mkdir(parents=True)
        (folder / first).write_text("{}")
        raise KeyboardInterrupt

    folder, tiny = tmp_path / "tiny", random_models.SHAPES["tiny"]
    with monkeypatch.context() as patch:
        patch.setattr(random_models, "make_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            random_models.checkpoint(tiny, folder)
    assert random_models.checkpoint(tiny, folder) == random_models.checkpoint(tiny, folder) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert quantlab.plan(folder).quantized


def test_a_model_is_not_made_over_what_is_none(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists and is no checkpoint; move it, or choose another --workdir"):
        random_models.checkpoint(random_models.SHAPES["tiny"], tmp_path)


@pytest.mark.parametrize("kv", [None, "int8"])
def test_decoding_is_timed_over_steps_in_a_static_cache(random_llama, kv: str | None, monkeypatch):
    model = quantlab.load(random_llama, kv=kv).eval()
    read, caches, forward = [], set(), model.forward

    def spy(*args, **kwargs):
        read.append(kwargs["input_ids"].shape[1])
        caches.add(all(layer.is_compileable for layer in kwargs["past_key_values"].layers))
        time.sleep(0.02 if len(read) > 16 else 0.001)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    with torch.inference_mode():
        times = generation_benchmark.decode_times(model, torch.randint(3, 512, (2, 40)), steps=8)
    assert read == [40] + [1] * 23
    assert caches == {True}
    assert len(times) == 7
    assert min(times) >= 20


def test_a_prefill_is_one_forward(random_llama):
    with torch.inference_mode():
        times = generation_benchmark.prefill_times(quantlab.load(random_llama), torch.randint(3, 512, (2, 40)), runs=3)
    assert len(times) == 3
    assert min(times) > 0


def test_cases():
    assert generation_benchmark.case_of("decode 16x2048") == ("decode", 16, 2048)
    for text in ("decode", "decode 0x4", "prefill 4", "train 1x1", "decode 1x2 "):
        with pytest.raises(UsageError, match="needs 'prefill BxS' or 'decode BxS'"):
            generation_benchmark.case_of(text)
    with pytest.raises(UsageError, match="case 'fast'"):
        benchmarks.generation("tiny", ["fp8-block"], None, cases=["fast"])


def test_models_are_beside_the_original():
    times = {"bf16": {"decode 4x8": (2.0, 3.0)}, "int4, KV fp8": {"decode 4x8": (0.5, 1.0)}}
    assert generation_benchmark._rows(["decode 4x8"], times) == [
        ("decode 4x8", "bf16", "2.00", "2000", "1.00x", "3.0"),
        ("decode 4x8", "int4, KV fp8", "0.50", "8000", "4.00x", "1.0"),
    ]


def test_who_is_timed_is_alone_and_who_compiles_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path))
    alone = threading.Event()

    def timed():
        with random_models.holding_gpu(fcntl.LOCK_EX):
            alone.set()

    with random_models.holding_gpu(fcntl.LOCK_SH):
        with random_models.holding_gpu(fcntl.LOCK_SH):
            waiting = threading.Thread(target=timed)
            waiting.start()
        assert not alone.wait(0.1)
    waiting.join(10)
    assert alone.is_set()


def test_a_model_without_memory_says_what_to_do():
    full: Future = Future()
    full.set_exception(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"))
    with pytest.raises(UsageError, match="int4: the GPU's memory is full; leave out --together"):
        generation_benchmark._tell(None, "int4", full, 1, 2)


def test_random_weights_are_converted_without_data(tmp_path):
    """They have no tokenizer: INT4, which is calibrated elsewhere, is not."""
    _, header, rows = benchmarks.conversion("tiny", ["int4-fp8", "fp8-block"], tmp_path)
    assert header == ("what", "int4-fp8", "fp8-block")
    assert all(float(value) >= 0 for value in rows[0][1:])
    assert {"quantize, share of the workers' time", "peak memory of the host, GB"} <= {what for what, *_ in rows}
    assert not any(quantlab.verify(tmp_path / f"tiny-{scheme}").problems for scheme in header[1:])
    with pytest.raises(UsageError, match=r"unknown model shape 'tin'.* did you mean 'tiny'"):
        benchmarks.conversion("tin", ["fp8-block"], None)


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_model_has_a_process_of_its_own(at_once: int, monkeypatch):
    """What is called there has to travel: here `dict`, in place of a folder, on cases that are its items."""
    monkeypatch.setattr(generation_benchmark, "step_times", operator.call)
    models = [generation_benchmark.Model(dict), generation_benchmark.Model(dict, "int4", "fp8")]
    assert generation_benchmark._times(models, [("decode 4x8", (2.0, 3.0))], at_once, None) == {
        "bf16": {"decode 4x8": (2.0, 3.0), "kv": None, "attention": None},
        "int4, KV fp8": {"decode 4x8": (2.0, 3.0), "kv": "fp8", "attention": None},
    }


@pytest.mark.gpu(sm=90)
def test_generation_is_timed(tmp_path):
    random_models.make_checkpoint(random_models.SHAPES["tiny"], tmp_path / "tiny", device="cuda")
    ((ms, peak),) = generation_benchmark.step_times(tmp_path / "tiny", ["prefill 2x64"], kv="fp8").values()
    assert ms > 0
    assert 0 < peak < 100


def test_cases_can_be_picked():
    _, _, rows = benchmarks.kernel_room("moe_dispatch", dry_run=True, only="16 qwen")
    assert rows == [("16 qwen3-30b",)]
    _, _, rows = benchmarks.kernel_room("attention", dry_run=True, only="mean 1")
    assert rows == [(f"{length} keys, values of mean 1",) for length in errors.LENGTHS]
    with pytest.raises(UsageError, match="mla: no case contains 'llama'; --dry-run without --case lists them"):
        benchmarks.kernel_room("mla", dry_run=True, only="llama")


@pytest.fixture
def built(monkeypatch):
    """(what, format) of all that benchmarks of whole layers build, of which nothing is built or timed here."""
    found: list[tuple[object, str]] = []

    def step(what, name, *_):
        found.append((what, name))
        return lambda *_: torch.ones(1)

    monkeypatch.setattr(latent_benchmark, "ours_step", step)
    monkeypatch.setattr(latent_benchmark, "their_step", lambda *_: lambda: torch.ones(1))
    monkeypatch.setattr(moe_benchmark, "build", step)
    monkeypatch.setattr(moe_benchmark, "original", lambda _: torch.nn.Module())
    monkeypatch.setattr(moe_benchmark, "routed", lambda *_: ())
    monkeypatch.setattr(moe_benchmark, "_traffic", lambda *_: 1.0)
    monkeypatch.setattr(moe_benchmark, "_figures", lambda *_, **__: ("",) * 4)
    monkeypatch.setattr(timing, "measure", lambda calls, rounds: {name: timing.Timing(2.0, 1.0, 3.0) for name in calls})
    return found


def test_layers_are_picked_before_they_are_built(built):
    (row,) = latent_benchmark.run("layer fp8-block, latents int4")
    assert row[0] == latent_benchmark.case("fp8-block", "int4")
    assert built == [("fp8-block", "int4")]
    rows = list(moe_benchmark.run("qwen3-30b experts int4"))
    layer = moe_benchmark.LAYERS["qwen3-30b"]
    assert built[1:] == [(layer, "int4-fp8"), (layer, "int4")]
    assert [row[0] for row in rows] == moe_benchmark.cases("qwen3-30b experts int4")
    assert [row[0] for row in moe_benchmark.run("M=16")] == moe_benchmark.cases("M=16")
    assert len(moe_benchmark.cases("M=16")) == 6


def test_an_error_is_the_same_beside_others_and_alone():
    everything = list(errors.report("cpu", tokens=64, lengths=(128,)))
    alone = list(errors.report("cpu", tokens=64, lengths=(128,), only="keys with"))
    assert [error.inputs for error in alone] == ["keys with a bias 64"] * 4
    assert set(alone) < set(everything)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_layers_need_a_gpu():
    for room, case in (("mla", "layer bf16"), ("moe", "experts int4 M=1"), ("attention", "outliers")):
        with pytest.raises(UsageError, match="needs a CUDA device; --dry-run works without one"):
            benchmarks.kernel_room(room, dry_run=False, only=case)


def test_latent_attention_is_two_rooms_and_a_layer():
    _, header, rows = benchmarks.kernel_room("mla", dry_run=True)
    assert header == ("case",)
    names = {"fp8 128x1", "int4 h16 128x4096", latent_benchmark.case("fp8-block", "fp8")}
    assert names <= {name for (name,) in rows}


@torch.no_grad()
def test_a_layer_is_timed_over_its_next_token():
    """Our steps lengthen the cache, transformers' begin anew, and both say nearly the same of the first."""
    theirs, ours = latent_benchmark.their_step(2, 8, "cpu"), latent_benchmark.ours_step("bf16", "16bit", 2, 8, "cpu")
    first = theirs()
    torch.testing.assert_close(theirs(), first)
    assert ((ours() - first).norm() / first.norm()).item() < 0.02
    assert not torch.equal(ours(), first)


@pytest.mark.gpu(sm=90)
@torch.no_grad()
def test_layers_are_timed(monkeypatch):
    monkeypatch.setattr(latent_benchmark, "TOKENS", 64)
    monkeypatch.setattr(latent_benchmark, "VARIANTS", [("bf16", "fp8"), ("fp8-block", "fp8")])
    rows = list(latent_benchmark.run())
    assert [row[0] for row in rows] == latent_benchmark.cases()
    assert all(float(row[2]) > 0 and "transformers bf16" in row[-1] for row in rows)
    assert all(float(row[-1].rpartition(" ")[2].rstrip("%")) < 20 for row in rows)


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


def test_a_room_ends_with_its_mean(monkeypatch):
    row = bench.Row("1 qwen3-30b", "triton", 10.0, 9.0, 11.0, 800.0, 100.0, 0.5, {"quantlab": 10.0, "steps": 20.0})
    monkeypatch.setattr(bench, "run", lambda room, **options: iter([row] if options == PICKED else []))
    _, header, rows = benchmarks.kernel_room("moe_route", dry_run=False, **PICKED)
    assert rows[0] == ("1 qwen3-30b", "triton", "10.0", "800", "100", "50%", "steps 2.00x")
    assert rows[1] == ("geometric mean of 1", *[""] * 5, "steps 2.00x")
    assert len(header) == len(rows[1])
    with pytest.raises(UsageError, match="moe_route: no case contains 'qwen9'; --dry-run without --case lists them"):
        benchmarks.kernel_room("moe_route", dry_run=False, only="qwen9")


def test_attention_lists_both_rooms_and_the_error_report():
    _, header, rows = benchmarks.kernel_room("attention", dry_run=True)
    assert header == ("case",)
    assert {("4x4096 16/16x128",), ("4x4k causal",), ("outliers 8192",)} <= set(rows)
    assert rows[-9:] == [(name,) for name in attention_benchmark.cases()]
    with pytest.raises(UsageError, match="did you mean 'attention'"):
        benchmarks.kernel_room("atention", dry_run=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_generation_needs_a_gpu():
    with pytest.raises(UsageError, match="timed on a GPU, and there is none here"):
        benchmarks.generation("tiny", ["fp8-block"], None)
