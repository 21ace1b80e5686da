"""`quantlab sensitivity`: the simulation against really quantized layers, the estimate against the exact answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from quantlab import hf
from quantlab import sensitivity as module
from quantlab.errors import UsageError
from quantlab.pipeline import plan, quantize
from quantlab.scheme import Recipe, Rule
from quantlab.sensitivity import draw, result_file, sensitivity
from quantlab.simulate import units_of

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
SMALL = {"samples": 4, "length": 96, "device": "cpu"}


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    return folder, sensitivity(MODEL, ["fp8-block"], folder / "exact.json", **SMALL)


@pytest.fixture(scope="module")
def moe(tiny, character_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "model"
    shutil.copytree(tiny("qwen3_moe").folder, folder)
    character_tokenizer(bos=True).save_pretrained(folder)
    return folder


def test_units_are_what_engines_fuse(moe):
    names = [unit.name for unit in units_of(plan(MODEL, "fp8-block"))]
    block = ("mlp.down_proj", "mlp.gate/up_proj", "self_attn.o_proj", "self_attn.q/k/v_proj")
    assert names == [f"model.layers.{i}.{leaf}" for i in range(5) for leaf in block]
    experts = [unit for unit in units_of(plan(moe, "fp8-block")) if "experts" in unit.name]
    assert [unit.name for unit in experts] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_ranked_and_saved(exact):
    folder, result = exact
    values = [effect.kl.value for effect in result.effects]
    assert len(values) == 20
    assert values == sorted(values, reverse=True)
    assert min(values) > 0
    saved = json.loads((folder / "exact.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert saved["method"] == "exact"
    assert len((folder / "exact.jsonl").read_text().splitlines()) == 21
    assert result.rows()[0][0] == 1
    assert result.rows()[0][1:3] == (result.effects[0].unit, "fp8-block")


def test_the_simulation_is_what_a_quantized_checkpoint_does(exact, tmp_path):
    """One group really quantized, loaded on our layers, and run on the same tokens."""
    from transformers import AutoTokenizer

    from quantlab_calib import data

    recipe = Recipe("fp8-block", (Rule("re:layers.4.mlp.(gate|up)_proj", "fp8-block"), Rule("*", "none")))
    quantize(MODEL, recipe, tmp_path / "one", device="cpu", workers=1)
    tokens = data.windows("bundled", AutoTokenizer.from_pretrained(MODEL), "calibration", count=4, length=96, seed=0)
    with torch.no_grad():
        base, ours = (
            hf.load(path, dtype=torch.float32)(tokens).logits[:, :-1].log_softmax(-1)
            for path in (MODEL, tmp_path / "one")
        )
    kl = float((base.exp() * (base - ours)).sum(-1).mean())
    (effect,) = [e for e in exact[1].effects if e.unit == "model.layers.4.mlp.gate/up_proj"]
    assert effect.kl.value == pytest.approx(kl, rel=0.01)


def test_the_estimate_ranks_like_the_exact_answer(exact, tmp_path):
    fast = sensitivity(MODEL, ["fp8-block"], tmp_path / "fast.json", fast=True, **SMALL)
    assert fast.method == "fast"
    assert not (tmp_path / "fast.jsonl").exists()
    found = {effect.unit: effect.kl.value for effect in fast.effects}
    pairs = [(effect.kl.value, found[effect.unit]) for effect in exact[1].effects]
    ranks = torch.tensor(pairs, dtype=torch.float64).argsort(0).argsort(0).T.double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    assert all(0.5 < estimate / measured < 2 for measured, estimate in pairs)


def test_it_continues_and_computes_nothing_twice(exact, tmp_path, monkeypatch):
    folder, result = exact
    lines = (folder / "exact.jsonl").read_text().splitlines()
    (tmp_path / "again.jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:20])  # killed while it wrote
    ran = []
    simulate = module.quantizing
    monkeypatch.setattr(module, "quantizing", lambda known, schemes: ran.extend(schemes) or simulate(known, schemes))
    again = sensitivity(MODEL, ["fp8-block"], tmp_path / "again.json", **SMALL)
    assert ran == ["model.layers.4.self_attn.o_proj", "model.layers.4.self_attn.q/k/v_proj"]
    assert again == result
    other = sensitivity(MODEL, ["fp8-block"], tmp_path / "again.json", samples=1, length=8, device="cpu")
    assert len(ran) == 22  # other data: nothing of the old journal holds
    assert other.settings["tokens"] != again.settings["tokens"]


def test_a_folder_that_is_not_there_yet(tmp_path):
    output = tmp_path / "new" / "deep" / "r.json"
    sensitivity(MODEL, ["fp8-block"], output, samples=1, length=8, device="cpu")
    assert output.is_file()
    assert output.with_suffix(".jsonl").is_file()


@pytest.mark.parametrize("fast", [False, True])
def test_experts(moe, tmp_path, fast):
    result = sensitivity(moe, ["fp8-dynamic"], tmp_path / "r.json", samples=2, length=32, device="cpu", fast=fast)
    effects = {effect.unit: effect.kl.value for effect in result.effects}
    assert {unit for unit in effects if "experts" in unit} == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}
    assert all(0 < value < 0.1 for value in effects.values())
    for effect in result.effects:  # what a recipe takes
        rules = tuple(Rule(pattern, "none") for pattern in effect.match)
        left = [d.module for d in plan(moe, Recipe("fp8-dynamic", rules)).decisions if d.reason.startswith("recipe: ")]
        assert len(left) >= len(effect.match)


def test_plot(exact):
    pytest.importorskip("matplotlib")
    (plot,) = draw(exact[1])
    assert plot.name == "fp8-block"
    assert plot.png().startswith(b"\x89PNG")


def test_refusals(tiny, tmp_path):
    for schemes, message in ((["fp8-blok"], "did you mean 'fp8-block'"), ([], "no scheme given")):
        with pytest.raises(UsageError, match=message):
            sensitivity(MODEL, schemes, tmp_path / "r.json")
    with pytest.raises(UsageError, match="does not predict the next token"):
        sensitivity(tiny("vit").folder, output=tmp_path / "r.json")
    with pytest.raises(UsageError, match="no such file"):
        sensitivity(MODEL, output=tmp_path / "r.json", calibration=str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="give the name of a JSON file"):
        result_file(MODEL, tmp_path)
    quantize(tiny("llama").folder, "fp8-block", tmp_path / "made", device="cpu", workers=1)
    with pytest.raises(UsageError, match="is itself quantized"):
        sensitivity(tmp_path / "made", output=tmp_path / "r.json")
