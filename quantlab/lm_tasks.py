"""lm-eval's tasks on a loaded model: the same library, harness settings and model object for both sides."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import UsageError

# What a task is judged by, where it reports several.
METRICS = ("acc_norm", "exact_match", "acc", "f1", "pass@1", "word_perplexity")
BATCH = 8


def require() -> None:
    """Raise UsageError where lm-eval is missing: before an evaluation, not after it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-eval; install it with: pip install 'quantlab-toolkit[eval]'")


def run(model: Any, folder: Path, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Task -> {"metric", "score", "error", "baseline": None}. Raises UsageError where lm-eval or a task is missing."""
    require()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    names = [name for task in tasks for name in task.split(",") if name]
    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=BATCH)
    try:
        results = lm_eval.simple_evaluate(model=wrapped, tasks=names)["results"]
    except (KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"lm-eval cannot run {', '.join(names)}: {reason}; `lm-eval ls tasks` lists what it has"
        ) from None
    return {name: _judged(result) for name, result in results.items()}


def _judged(result: dict[str, Any]) -> dict[str, Any]:
    """One number of an lm-eval result, whose keys are "metric,filter" and "metric_stderr,filter"."""
    keys = [key for key in result if "," in key and "_stderr," not in key]
    key = next((k for metric in METRICS for k in keys if k.split(",")[0] == metric), keys[0] if keys else None)
    if key is None:
        return {"metric": "none", "score": None, "error": None, "baseline": None}
    metric, _, which = key.partition(",")
    error = result.get(f"{metric}_stderr,{which}")
    return {
        "metric": metric,
        "score": float(result[key]),
        "error": float(error) if isinstance(error, float | int) else None,
        "baseline": None,
    }


def with_baseline(tasks: dict[str, dict[str, Any]], baseline: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: task | {"baseline": baseline[name]["score"]} for name, task in tasks.items()}


def recovery(tasks: dict[str, dict[str, Any]]) -> float | None:
    """Mean over the tasks of score / baseline's score; tasks that the baseline fails outright, and perplexities, which
    fall as models get better, are left out. None where no task is left."""
    ratios = [
        task["score"] / task["baseline"]
        for task in tasks.values()
        if task["baseline"] and task["score"] is not None and "perplexity" not in task["metric"]
    ]
    return sum(ratios) / len(ratios) if ratios else None
