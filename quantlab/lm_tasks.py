"""lm-eval's tasks on a loaded model: the same library, harness settings and model object for both sides."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from quantlab.errors import UsageError, one_line

# What a task is judged by, where it reports several.
METRICS = ("acc_norm", "exact_match", "acc", "f1", "pass@1", "word_perplexity")
BATCH = 8
INSTALL = "install it with: pip install 'quantlab-toolkit[eval]'"


def require(tasks: Sequence[str]) -> None:
    """Raise UsageError, before an evaluation and not after it, where lm-eval, a task or a task's data is missing."""
    try:
        from lm_eval import tasks as known
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-eval; {INSTALL} ({one_line(error)})") from None
    if not hasattr(known.TaskManager, "load"):
        raise UsageError(f"--tasks needs lm-eval 0.4.12 or newer; {INSTALL}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of lm-eval and of what reads the data
            _manager().load(_names(tasks))
    except Exception as error:  # whatever lm-eval, datasets or a hub raises
        raise UsageError(
            f"lm-eval cannot run {', '.join(_names(tasks))} ({one_line(error)}); `lm-eval ls tasks` lists what it has, "
            "and data come from the hub"
        ) from None


@cache
def _manager() -> Any:
    """lm-eval's index of all its tasks: thousands of files, so it is made once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _names(tasks: Sequence[str]) -> list[str]:
    return [name for task in tasks for name in task.split(",") if name]


def run(model: Any, tokenizer: Any, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Task -> {"metric", "score", "error", "baseline": None, "group"}; `require` has looked at the tasks.

    A group that was asked for is there beside its tasks, each of which names it.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is given as one
    with warnings.catch_warnings(action="ignore"):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        found = lm_eval.simple_evaluate(model=wrapped, tasks=_names(tasks), task_manager=_manager())
    groups = {task: group for group, members in found.get("group_subtasks", {}).items() for task in members}
    return {name: _judged(result) | {"group": groups.get(name)} for name, result in found["results"].items()}


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
    """Mean over the tasks of score / baseline's score. None where no task is left.

    Left out are tasks that the baseline fails outright, perplexities, which fall as models get better, and what a group
    with a score of its own counts already.
    """
    ratios = [
        task["score"] / task["baseline"]
        for task in tasks.values()
        if task["baseline"] and task["score"] is not None and "perplexity" not in task["metric"]
        if task["group"] not in tasks or tasks[task["group"]]["score"] is None
    ]
    return sum(ratios) / len(ratios) if ratios else None
