"""`evaluate` from end to end: what it measures, keeps, saves and refuses."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import quantlab
from quantlab import baselines, hf, lm_tasks
from quantlab.cli import app
from quantlab.errors import UsageError, VerificationError
from quantlab.evaluate import evaluate
from quantlab.pipeline import quantize
from quantlab_calib import data

EMBEDDED = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i * i} is the square of {i}. " for i in range(200)))
    return path


@pytest.fixture(scope="module")
def llama(tiny, character_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(tiny("llama").folder, folder)
    character_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "llama-fp8-block"
    quantize(llama, "fp8-block", folder, device="cpu", workers=1)
    return folder


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the model that a test may damage."""
    shutil.copytree(llama, tmp_path / "copy")
    return tmp_path / "copy"


def measure(model, text, **settings):
    return evaluate(model, text=text, **{"windows": 6, "length": 32} | settings)


def test_a_model_against_itself_loses_nothing(llama, text):
    found = measure(llama, text, baseline=llama)
    assert (found.kl.value, found.top1.value, found.perplexity_ratio.value, found.recovery) == (0, 1, 1, 1)
    assert found.kl.error == found.perplexity_ratio.error == 0
    assert found.perplexity == found.baseline_perplexity


def test_perplexity_is_that_of_the_model_itself(llama, text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantlab_calib import data

    found = measure(llama, text, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokens = data.windows(str(text), AutoTokenizer.from_pretrained(llama), "evaluation", count=6, length=32)
    assert (tokens[:, 0] == 1).all()  # BOS
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in tokens]
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / 6), rel=1e-4)
    assert found.windows["nll"] == pytest.approx(losses, rel=1e-4)
    assert found.kl is None
    assert found.recovery is None
    assert found.settings["tokens_scored"] == 6 * 31


def test_quantization_costs_a_little_and_the_result_is_saved(llama, made, text):
    found = measure(made, text, baseline=llama)
    assert 0 < found.kl.value < 0.05
    assert 0.5 < found.top1.value < 1
    assert found.recovery == pytest.approx(1 / found.perplexity_ratio.value)
    ratio = found.perplexity.value / found.baseline_perplexity.value
    assert found.perplexity_ratio.value == pytest.approx(ratio, rel=1e-5)
    saved = json.loads((made / "quantlab/eval.json").read_text())
    assert saved == json.loads(json.dumps(found.to_dict()))
    settings = saved["settings"]
    assert settings["texts"] == {str(text): 6}
    assert settings["baseline_dtype"] == settings["dtype"] == "bfloat16"
    assert set(settings["versions"]) == {"quantlab", "torch", "transformers", "python"}
    assert len(saved["windows"]["kl"]) == 6
    ((title, header, rows),) = found.tables()
    assert "6 windows of 32 tokens, bfloat16 on cpu" in title
    assert header == ("measure", "value", "standard error", "95 % interval")
    assert [row[0] for row in rows][-1] == "recovery"


def test_texts_side_by_side_speed_and_memory(llama, made, text):
    found = measure(made, text, baseline=llama, generate=True)
    assert found.speed["tokens_per_second"] > 0
    assert found.speed["peak_bytes"]["host"] > 1e6
    written = found.generation
    assert list(written) == ["model", "baseline"]
    assert written["model"]["prompts"] == written["baseline"]["prompts"]
    assert all(len(one["texts"]) == 3 and one["tokens_per_second"] > 0 for one in written.values())
    assert written["model"]["weight_bytes"] < 0.9 * written["baseline"]["weight_bytes"]
    title, header, rows = found.tables()[-1]
    assert (title, header) == ("continuations of a text, greedy", ("", "model", "baseline"))
    assert len(rows) == 2 + 3
    assert not any("\n" in cell for row in rows for cell in row)
    assert not measure(made, text).generation


def test_a_result_goes_where_it_is_asked_for_too(llama, text, tmp_path):
    file = tmp_path / "eval.json"
    found = measure(llama, text, output=file, kv="int8", dtype="float32")
    assert json.loads(file.read_text()) == json.loads(json.dumps(found.to_dict()))
    assert "6 windows of 32 tokens, float32, kv int8 on cpu" in found.tables()[0][0]
    with pytest.raises(UsageError, match="cannot be written; give the name of a file elsewhere"):
        measure(llama, text, output=tmp_path)


def test_the_baseline_runs_once(llama, made, text, monkeypatch, cache):
    first = measure(made, text, baseline=llama)
    loaded = []
    load = hf.load
    monkeypatch.setattr(hf, "load", lambda folder, **kw: loaded.append(folder) or load(folder, **kw))
    second = measure(made, text, baseline=llama)
    assert loaded == [made]
    assert (first.kl, first.windows) == (second.kl, second.windows)
    assert not first.settings["baseline_from_cache"]
    assert second.settings["baseline_from_cache"]
    (file,) = (cache / "baselines").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert measure(made, text, baseline=llama).kl == first.kl
    assert loaded == [made, llama, made]


def test_what_is_kept_belongs_to_one_content(llama, copy, text):
    measure(llama, text, baseline=llama)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert not measure(llama, text, baseline=copy).settings["baseline_from_cache"]
    assert not measure(llama, text, baseline=llama, dtype="float32").settings["baseline_from_cache"]
    assert not measure(llama, text, baseline=llama, windows=5).settings["baseline_from_cache"]
    assert measure(llama, text, baseline=llama).settings["baseline_from_cache"]


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "file").write_text("")
    baselines.write(tmp_path / "file" / "x.safetensors", torch.zeros(1, 1, 1))
    assert baselines.read(tmp_path / "absent.safetensors", torch.zeros(1, 2)) is None


def test_models_on_the_hub_are_those_of_the_revisions(llama, made, text, hub_models):
    asked = hub_models({"me/made": made, "me/llama": llama})
    models = ["me/made", "--revision", "v1", "--baseline", "me/llama", "--baseline-revision", "v2"]
    small = ["--text", str(text), "--windows", "2", "--length", "16"]
    done = CliRunner().invoke(app, ["eval", *models, *small])
    assert done.exit_code == 0, done.output
    assert asked == [("me/made", "v1"), ("me/llama", "v2")]
    settings = json.loads((made / "quantlab/eval.json").read_text())["settings"]
    assert (settings["revision"], settings["baseline_revision"]) == ("v1", "v2")


def test_revisions_of_what_is_not_on_the_hub(llama, made, text):
    folder = "revision v2 needs a model on the hub, this is a folder"
    with pytest.raises(UsageError, match=f"{made}: {folder}"):
        measure(made, text, revision="v2")
    with pytest.raises(UsageError, match=f"{llama}: {folder}"):
        measure(made, text, baseline=llama, baseline_revision="v2")
    with pytest.raises(UsageError, match="baseline_revision = 'v2' is of a baseline; give its hub id as well"):
        measure(made, text, baseline_revision="v2")


def test_several_texts_share_the_windows(llama, text, tmp_path):
    (tmp_path / "other.txt").write_text("words of another kind, " * 50)
    found = measure(llama, [text, tmp_path / "other.txt"])
    assert found.settings["texts"] == {str(text): 3, str(tmp_path / "other.txt"): 3}


def test_each_text_has_its_own_numbers(llama, made, text, tmp_path):
    (tmp_path / "other.txt").write_text("A short one, again and again. " * 60)
    both = [text, tmp_path / "other.txt"]
    found = evaluate(made, baseline=llama, text=both, windows=8, length=32)
    alone = [evaluate(made, baseline=llama, text=one, windows=4, length=32) for one in both]
    assert list(found.texts) == list(map(str, both))
    for part, whole in zip(found.texts.values(), alone, strict=True):
        assert part == {name: getattr(whole, name) for name in part}
        assert not whole.texts
    assert found.kl.value == pytest.approx(sum(one.kl.value for one in alone) / 2)
    assert found.tables()[1][0] == "each text"


def test_a_text_that_is_given_twice_counts_once(llama, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("what else there is to say " * 100)
    once, twice = (measure(llama, texts, windows=12) for texts in ([text, other], [text, other, text]))
    assert once.settings["texts"] == twice.settings["texts"]
    assert once.texts == twice.texts


def test_context_is_read_and_not_scored(llama, text):
    whole, late = (measure(llama, text, baseline=llama, context=context) for context in (0, 24))
    assert late.settings["tokens_scored"] == 6 * 8
    assert whole.settings["tokens_scored"] == 6 * 31
    assert "24 of them context" in late.tables()[0][0]
    assert late.perplexity.value != whole.perplexity.value
    for context, message in ((-1, "0 or more"), (32, "no room for text")):
        with pytest.raises(UsageError, match=message):
            measure(llama, text, context=context)


def test_a_gate_fails_after_the_result_is_saved(llama, made, copy, text):
    (made / "quantlab/eval.json").unlink(missing_ok=True)
    measure(made, text, baseline=llama, min_recovery=0.5)
    assert (made / "quantlab/eval.json").is_file()
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] *= 100  # sure of itself and wrong
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "quantlab").mkdir()
    with pytest.raises(
        VerificationError, match=r"recovery 0\.\d+ is below the required 0\.99; leave sensitive"
    ) as error:
        measure(copy, text, baseline=llama, min_recovery=0.99)
    assert error.value.exit_code == 4
    assert json.loads((copy / "quantlab/eval.json").read_text())["recovery"] < 0.99


def test_nan_weights_are_reported_not_averaged(copy, text):
    weights = load_file(copy / "model.safetensors")
    broken = {
        "model.norm.weight": r"not finite, first in model\.norm:",
        "model.layers.1.mlp.up_proj.weight": r"not finite, first in model\.layers\.1\.mlp\.up_proj:",
        "lm_head.weight": r"logits of the model are not finite at token 0 of a window, its hidden states are",
    }
    for name, message in broken.items():
        damaged = {key: value.clone() for key, value in weights.items()}
        damaged[name].view(-1)[3] = math.nan
        save_file(damaged, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(VerificationError, match=message):
            measure(copy, text)


def test_tokenizers_and_vocabularies_must_agree(llama, copy, text, character_tokenizer):
    character_tokenizer(bos=False).save_pretrained(copy)
    with pytest.raises(
        UsageError, match="have different tokenizers; the baseline is the model that the other was made"
    ):
        measure(llama, text, baseline=copy)
    character_tokenizer(bos=True).save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    with pytest.raises(UsageError, match="have vocabularies of 128 and 60 tokens"):
        measure(llama, text, baseline=copy)
    with pytest.raises(UsageError, match=r"its tokenizer gives token \d+, its vocabulary has 60"):
        measure(copy, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "absent.txt"}, "no such file: absent.txt; give a text or JSONL file"),
        ({"dtype": "float23"}, "dtype 'float23'; known: auto, bfloat16, float16, float32; did you mean 'float32'?"),
        ({"length": 1}, "windows of 1 tokens: needs 2 at least"),
        ({"windows": 0}, "0 windows: needs one at least"),
        ({"windows": 5000}, "155000 needed for 5000 x 32; give more text, or fewer or shorter windows"),
        ({"min_recovery": 0.9}, "min_recovery needs a baseline"),
        ({"min_recovery": 99.0, "baseline": "x"}, "min_recovery = 99.0: needs a part between 0 and 1"),
        ({"tasks": ["arc_easy"]}, "--tasks needs lm-eval; install it with: pip install 'quantlab-toolkit[eval]'"),
    ],
)
def test_settings_that_do_not_fit(llama, text, settings, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError) as error:
        evaluate(llama, **{"text": text, "windows": 6, "length": 32} | settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_models_without_a_next_token_are_refused_before_they_are_loaded(tiny, text, name, monkeypatch):
    monkeypatch.setattr(hf, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UsageError, match="does not predict the next token"):
        measure(tiny(name).folder, text)


def test_no_tokenizer_and_a_quantized_baseline(llama, made, copy, text):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match=r"tokenizer.json beside the weights"):
        measure(copy, text)
    with pytest.raises(UsageError, match=r"is itself quantized; give .* `quantlab convert --to bf16`"):
        measure(llama, text, baseline=made)


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["land", "sea"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_eval_tasks_on_both_models(llama, made, text, tmp_path):
    """The library itself, on tasks whose data lie in a local file: the shares of right answers are counted here."""
    questions = [{"question": f"{number} rivers flow into the", "answer": number % 2} for number in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    tasks = [tmp_path / f"{name}.yaml" for name in ("rivers", "more")]
    for task in tasks:
        task.write_text(TASK.format(name=task.stem, data=tmp_path / "data.jsonl"))
    found = measure(made, text, baseline=llama, tasks=[",".join(map(str, tasks))])
    assert list(found.tasks) == ["rivers", "more"]
    right = found.tasks["rivers"]
    assert right["metric"] == "acc"
    assert right["score"] == pytest.approx(share_of_right_answers(made, questions))
    assert right["baseline"] == pytest.approx(share_of_right_answers(llama, questions))
    assert right["error"] > 0
    assert found.recovery == min(1 / found.perplexity_ratio.value, lm_tasks.recovery(found.tasks))
    assert found.tables()[1][2][0][:3] == ("rivers", "acc", f"{right['score']:.4f}")


def share_of_right_answers(folder, questions) -> float:
    model, tokenizer = quantlab.load(folder), data.load_tokenizer(folder)

    def likelihood(question: str, answer: str) -> float:
        given = tokenizer.encode(question)
        both = torch.tensor([tokenizer.encode(f"{question} {answer}")])
        logits = model(both).logits[0, :-1].float().log_softmax(-1)
        return sum(float(logits[i - 1, both[0, i]]) for i in range(len(given), both.shape[1]))

    with torch.inference_mode():
        best = [max((0, 1), key=lambda i: likelihood(q["question"], ("land", "sea")[i])) for q in questions]
    return sum(a == q["answer"] for a, q in zip(best, questions, strict=True)) / len(questions)


@pytest.mark.parametrize("tasks", [["no_such_task"], ["absent.yaml"]])
def test_tasks_that_lm_eval_cannot_run_are_told_before_the_work(tasks, monkeypatch):
    monkeypatch.setattr(hf, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=f"lm-eval cannot run {tasks[0]} .*`lm-eval ls tasks` lists what it has"):
        evaluate(EMBEDDED, tasks=tasks)


def test_a_task_is_judged_by_its_best_known_metric():
    result = {"alias": "arc", "acc,none": 0.1, "acc_norm,none": 0.45, "acc_norm_stderr,none": 0.02}
    assert lm_tasks._judged(result) == {"metric": "acc_norm", "score": 0.45, "error": 0.02, "baseline": None}
    assert lm_tasks._judged({"alias": "group"})["score"] is None


def test_recovery_of_tasks_leaves_out_what_has_no_ratio():
    def task(score, baseline, metric="acc", group=None):
        return {"score": score, "baseline": baseline, "metric": metric, "error": None, "group": group}

    assert lm_tasks.recovery({}) is None
    assert lm_tasks.recovery({"a": task(0.4, 0.5), "b": task(0.5, 0.0), "c": task(0.6, 0.5)}) == pytest.approx(1.0)
    assert lm_tasks.recovery({"a": task(9.0, 3.0, "word_perplexity")}) is None
    members = {"a": task(0.5, 1.0, group="g"), "b": task(0.7, 1.0, group="g")}
    assert lm_tasks.recovery(members | {"g": task(0.6, 1.0), "c": task(0.8, 1.0)}) == pytest.approx(0.7)
    assert lm_tasks.recovery(members | {"g": task(None, None)}) == pytest.approx(0.6)


def test_attention_in_8_bits_is_measured_in_windows_of_any_length(tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    found = evaluate(folder, baseline=folder, windows=2, length=64, attention="int8")
    assert found.settings["attention"] == "int8"
    assert 1e-6 < found.kl.value < 0.01
    assert evaluate(folder, baseline=folder, windows=2, length=64, attention="none").kl.value == 0


def test_refuses_attention_that_it_does_not_know(llama, text):
    with pytest.raises(UsageError, match="unknown attention 'int4'; known: fp8, int8, none; did you mean 'int8'"):
        measure(llama, text, attention="int4")
    with pytest.raises(
        UsageError, match="kv = 'int8' reads windows in steps, attention = 'fp8' at once; leave one out"
    ):
        measure(llama, text, attention="fp8", kv="int8")
    with pytest.raises(UsageError, match="attention = 'fp8' and attn_implementation are both given"):
        hf.load(llama, attention="fp8", attn_implementation="sdpa")
