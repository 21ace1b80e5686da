"""`quantlab compare`: paired differences, their errors, and what may not be compared."""

from __future__ import annotations

import json
import math

import pytest
import torch

from quantlab.compare import compare
from quantlab.errors import UsageError

SETTINGS = {
    "texts": {"bundled": 40}, "length": 256, "windows": 40, "tokens_sha256": "ab", "dtype": "bfloat16",
    "device": "cpu", "versions": {"torch": "2.13.0"},
}  # fmt: skip


def evaluation(seed: int, loss: float, **changes):
    """A run of 40 windows of very different difficulty, on which this model loses `loss` nats, a little scattered."""
    difficulty = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scatter = 0.001 * torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    base = (3 + difficulty).tolist()
    windows = {
        "nll": (3 + difficulty + loss + scatter).tolist(), "baseline_nll": base, "kl": (loss + scatter).abs().tolist(),
        "top1": (0.97 - loss + scatter).tolist(),
    }  # fmt: skip
    return {
        "model": "m", "baseline": "b", "perplexity": {"value": 20.0, "error": 3.0}, "tasks": {},
        "windows": windows, "settings": SETTINGS,
    } | changes  # fmt: skip


@pytest.fixture
def save(tmp_path):
    def write(name: str, content) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


def test_differences_are_paired(save):
    found = compare(save("a", evaluation(1, 0.01)), save("b", evaluation(2, 0.02)))
    perplexity, kl, top1 = found.differences
    assert perplexity.change.value == pytest.approx(math.exp(0.01), abs=0.0005)
    # unpaired, the windows' difficulty alone would give an error of about 0.2
    assert perplexity.change.error == pytest.approx(0.001 * math.sqrt(2 / 40), rel=0.4)
    assert kl.change.value == pytest.approx(0.01, abs=0.0005)
    assert kl.sigmas == pytest.approx(kl.change.value / kl.change.error)
    assert perplexity.sigmas > 10
    assert top1.sigmas < -10
    assert [row[0] for row in found.rows()] == ["perplexity (B / A)", "KL to the baseline (nats) (B - A)",
                                                "top-1 agreement (B - A)"]  # fmt: skip


def test_errors_of_differences_hold_under_resampling(save):
    """Of many pairs of runs that differ by chance alone, about two in three lie within one standard error."""
    within = sum(
        abs(compare(save("a", evaluation(2 * i, 0.01)), save("b", evaluation(2 * i + 1, 0.01))).differences[0].sigmas)
        < 1
        for i in range(1, 201)
    )
    assert 0.58 < within / 200 < 0.78  # 0.68 expected, three standard deviations of a binomial are 0.1


def test_ways_of_running_are_noted_and_contexts_have_to_agree(save):
    a = save("a", evaluation(1, 0.01))
    other = evaluation(2, 0.01) | {"settings": SETTINGS | {"kv": "int8", "attention": "int8", "context": 0}}
    assert compare(a, save("b", other)).notes == ("kv differs: none and int8", "attention differs: none and int8")
    with pytest.raises(UsageError, match="not measured alike: context 0 and 64"):
        compare(a, save("b", evaluation(2, 0.01) | {"settings": SETTINGS | {"context": 64}}))


def test_a_run_against_itself(save):
    path = save("a", evaluation(1, 0.01))
    assert all((d.change.error, d.sigmas) == (0, None) for d in compare(path, path).differences)
    assert [d.change.value for d in compare(path, path).differences] == [1, 0, 0]


def test_tasks_combine_their_errors(save):
    def task(score):
        return {"tasks": {"arc": {"score": score, "error": 0.03, "baseline": None, "metric": "acc"}}}

    found = compare(save("a", evaluation(1, 0.01, **task(0.5))), save("b", evaluation(1, 0.01, **task(0.6))))
    assert found.differences[-1].change.error == pytest.approx(0.03 * math.sqrt(2))
    assert found.differences[-1].change.value == pytest.approx(0.1)
    without = compare(save("a", evaluation(1, 0.01, **task(None))), save("b", evaluation(1, 0.01, **task(0.6))))
    assert len(without.differences) == len(found.differences) - 1  # a group of tasks may have no score of its own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_sha256": "cd", "texts": {"wiki": 40}}, "not measured alike: text bundled and wiki"),
        ({"tokens_sha256": "cd"}, r"text bundled and bundled \(other tokens\)"),
        ({"length": 512}, "length 256 and 512"),
        ({"dtype": "float32"}, "dtype bfloat16 and float32"),
    ],
)
def test_other_settings_are_refused(save, changes, message):
    other = evaluation(2, 0.02, settings=SETTINGS | changes)
    with pytest.raises(UsageError, match=message):
        compare(save("a", evaluation(1, 0.01)), save("b", other))


def test_other_baselines_are_refused(save):
    other = evaluation(2, 0.02, baseline="c")
    other["windows"]["baseline_nll"] = [2.0] * 40
    with pytest.raises(UsageError, match="different baselines: b and c"):
        compare(save("a", evaluation(1, 0.01)), save("b", other))


def test_what_is_no_evaluation(save, tmp_path):
    good = save("a", evaluation(1, 0.01))
    with pytest.raises(UsageError, match="no evaluation there; run `quantlab eval`"):
        compare(good, tmp_path)
    damaged = evaluation(1, 0.01)
    damaged["windows"]["nll"] = ["many"]
    for content in ([], {"windows": {}}, evaluation(1, 0.01, settings={}), damaged):
        with pytest.raises(UsageError, match="is not a result of `quantlab eval`"):
            compare(good, save("b", content))


def test_notes(save):
    other = evaluation(2, 0.02, settings=SETTINGS | {"device": "cuda:0", "versions": {"torch": "2.9.0"}})
    del other["windows"]["kl"]
    notes = compare(save("a", evaluation(1, 0.01)), save("b", other)).notes
    assert notes[:2] == ("devices differ: cpu and cuda:0", "versions of torch differ: 2.13.0 and 2.9.0")
    assert "no baseline" in notes[2]


def test_folders(tmp_path):
    folder = tmp_path / "checkpoint" / "quantlab"
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(evaluation(1, 0.01)))
    assert len(compare(folder.parent, folder / "eval.json").differences) == 3
