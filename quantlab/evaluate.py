"""What quantization cost: perplexity, KL to the baseline, top-1 agreement, and lm-eval tasks.

The baseline runs first, alone, and leaves its last hidden states (`baselines`); then the quantized model runs, and both
get their logits slice by slice. So memory holds one model and the baseline's head, and a second evaluation against the
same baseline does not run it at all. Two models side by side would need the memory of both.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab import baselines, generation, hf, lm_tasks
from quantlab.baselines import Baseline
from quantlab.checkpoint import OURS, config_of_quantization
from quantlab.errors import UsageError, VerificationError
from quantlab.kinds import context_length
from quantlab.output import check_file, write_file
from quantlab.scheme import did_you_mean
from quantlab.scoring import (
    Estimate,
    Logits,
    Scores,
    estimate,
    exponential,
    head_of,
    hidden_states,
    interval,
    open_predictor,
    score_window,
)
from quantlab.source import Source
from quantlab.stream import pick_device
from quantlab.summary import Progress, Shown, Table, peak_bytes
from quantlab_calib import data

MOST_WINDOWS = 256
LENGTH = 1024  # tokens per window where the model's context allows it
BATCH_TOKENS = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Evaluation(Shown):
    """Result of `evaluate`. Estimates carry standard errors; those against a baseline are None without one.

    perplexity        exp of the mean negative log-likelihood per token
    perplexity_ratio  perplexity / baseline's, with the error of the paired difference: far smaller than that of either
    kl                mean KL(baseline || model) per token, nats
    top1              share of tokens where both models find the same token the likeliest
    recovery          baseline's perplexity / perplexity; with tasks the lower of that and the mean over tasks of
                      score / baseline's score. 1 is no loss. None without a baseline
    tasks             task -> {"score", "error", "baseline", "metric", "group": the one it was asked for with, or None}
    texts             text -> the estimates above on its windows alone, where there are several texts
    generation        "model" and "baseline" -> what each writes, how fast, in how much memory (`generation.Written`)
    speed             of scoring on this device: tokens_per_second, and peak_bytes of the process, host and gpu
    windows           per window means of nll (and baseline_nll, kl, top1), for paired comparisons between runs
    settings          all that decides the numbers: texts, windows, dtypes, devices, versions, hashes
    """

    model: str
    baseline: str | None
    perplexity: Estimate
    baseline_perplexity: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None
    recovery: float | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    generation: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    windows: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> list[Table]:
        named = {
            "perplexity": self.perplexity,
            "perplexity of the baseline": self.baseline_perplexity,
            "perplexity / baseline's": self.perplexity_ratio,
            "KL to the baseline (nats)": self.kl,
            "top-1 agreement": self.top1,
        }
        rows: list[tuple[Any, ...]] = [(name, *_cells(e, self.settings["windows"])) for name, e in named.items() if e]
        if self.recovery is not None:
            rows.append(("recovery", f"{self.recovery:.4f}", "", ""))
        header: tuple[str, ...] = ("measure", "value", "standard error", "95 % interval")
        tables: list[Table] = [(f"{self.model}: {self._what()}", header, rows)]
        if self.texts:
            header = ("text", *next(iter(self.texts.values())))
            tables.append(("each text", header, [(text, *map(str, es.values())) for text, es in self.texts.items()]))
        if self.tasks:
            header = ("task", "metric", "score", "standard error", "baseline")
            tables.append(("tasks", header, [_task_row(name, task) for name, task in self.tasks.items()]))
        if self.generation:
            tables.append(("continuations of a text, greedy", ("", *self.generation), generation.rows(self.generation)))
        return tables

    def _what(self) -> str:
        s = self.settings
        context = f", {s['context']} of them context" if s.get("context") else ""
        ways = "".join(f", {name} {s[name]}" for name in ("kv", "attention") if s.get(name, "none") != "none")
        return f"{s['windows']} windows of {s['length']} tokens{context}, {s['dtype']}{ways} on {s['device']}"


def _cells(e: Estimate, windows: int) -> tuple[str, str, str]:
    within = interval(e, windows)
    between = "" if within is None else f"{within[0]:.5g} to {within[1]:.5g}"
    return f"{e.value:.5g}", "" if e.error is None else f"{e.error:.2g}", between


def _task_row(name: str, task: dict[str, Any]) -> tuple[Any, ...]:
    cells = ("" if task[key] is None else f"{task[key]:.4f}" for key in ("score", "error", "baseline"))
    return (name, task["metric"], *cells)


def evaluate(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    text: str | Path | Sequence[str | Path] = (),
    dataset: str | Sequence[str] = (),
    tasks: Sequence[str] = (),
    windows: int | None = None,
    length: int | None = None,
    context: int = 0,
    device_map: str = "auto",
    dtype: str = "auto",
    kv: str | None = None,
    attention: str | None = None,
    generate: bool = False,
    min_recovery: float | None = None,
    output: str | Path | None = None,
    revision: str | None = None,
    baseline_revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a causal language model, against its baseline if there is one, and save the result in its folder.

    text, dataset  local files and data set names, all taken together; by default the bundled text
    tasks          names of lm-eval tasks (needs the extra "eval"), run on both models with the same settings
    windows        how many, spread evenly over the text; None takes all, at most MOST_WINDOWS
    length         tokens per window, by default 1024 or the model's context if that is less; each starts with the
                   tokenizer's own first tokens (BOS where it has one), and all tokens but the first are scored
    context        tokens at the start of each window that are not scored: every scored token sees at least so many
                   before it. Windows may share them with the end of the window before
    dtype          of what is not quantized, for both models; "auto" takes each checkpoint's
    kv             format of the model's KV cache, None as its recipe says; with one, windows are read in steps of few
                   tokens, each out of the packed cache. The baseline's is 16-bit
    attention      "int8" or "fp8": the model's attention runs in 8 bits, also in windows too short to gain by it
                   (and its KV cache is none)
    generate       let both models continue three prompts: texts side by side, tokens per second, memory
    min_recovery   raises VerificationError, after saving, for a recovery below this
    output         JSON file for the result, besides the one in the folder, which the next evaluation writes over
    revision       branch, tag or commit of the model on the hub; baseline_revision: of the baseline

    Raises UsageError for models, texts and tokenizers that do not fit, VerificationError for logits that are not
    finite.
    """
    device_map, dtype = str(device_map), str(dtype).removeprefix("torch.")
    _check_arguments(baseline, text, device_map, dtype, windows, length, min_recovery, baseline_revision)
    hf.require_settings(kv, attention)
    if output is not None:
        check_file(Path(output))
    if attention not in (None, "none"):
        if kv not in (None, "none"):
            raise UsageError(f"kv = {kv!r} reads windows in steps, attention = {attention!r} at once; leave one out")
        kv = "none"
    if context < 0:
        raise UsageError(f"context = {context}: needs a number of tokens, 0 or more")
    if tasks:
        lm_tasks.require(tasks)
    run = _Run(device_map, dtype, trust_remote_code, progress)
    source = open_predictor(model, trust_remote_code, revision)
    length = _fitting_length(source, length)
    reference = open_predictor(baseline, trust_remote_code, baseline_revision) if baseline is not None else None
    texts = list(dict.fromkeys([*_listed(text), *_listed(dataset)])) or ["bundled"]  # twice would count twice
    parts = run.tokens(source, reference, texts, windows, length, context)
    tokens = torch.cat(parts)

    kept = run.baseline(reference, tokens) if reference else None
    loaded = run.load(source, kv, attention)
    start = time.perf_counter()
    scores = run.score(loaded, tokens, kept).after(context)
    speed = {"tokens_per_second": tokens.numel() / (time.perf_counter() - start), "peak_bytes": peak_bytes()}
    tokenizer = data.load_tokenizer(source.folder, trust_remote_code=trust_remote_code) if tasks else None
    results = lm_tasks.run(loaded, tokenizer, tasks) if tasks else {}
    settings = {
        "texts": {text: len(part) for text, part in zip(texts, parts, strict=True)},
        "windows": len(tokens),
        "length": length,
        "context": context,
        "tokens_scored": scores.nll.numel(),
        "tokens_sha256": baselines.digest(tokens),
        "dtype": _plain(loaded.dtype),
        "kv": _kv_of(loaded),
        "attention": attention or "none",
        "baseline_dtype": _plain(kept.hidden.dtype) if kept else None,
        "baseline_from_cache": kept.cached if kept else None,
        "revision": revision,
        "baseline_revision": baseline_revision,
        "device": str(loaded.device),
        "versions": _versions(),
    }
    del loaded
    if tasks and reference:
        results = lm_tasks.with_baseline(results, lm_tasks.run(run.load(reference), tokenizer, tasks))
    made = summarize(str(model), str(baseline) if baseline is not None else None, scores, results, settings)
    written = run.write(source, reference, partial(run.load, source, kv, attention)) if generate else {}
    evaluation = replace(made, speed=speed, generation=written)
    _save(evaluation, source, output)
    _gate(evaluation, min_recovery)
    return evaluation


def summarize(
    model: str, baseline: str | None, scores: Scores, tasks: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> Evaluation:
    """The numbers of an evaluation from the scores of its tokens."""
    columns = {"nll": scores.nll, "baseline_nll": scores.baseline_nll, "kl": scores.kl, "top1": scores.agree}
    per_window = {name: c.double().mean(dim=1).tolist() for name, c in columns.items() if c is not None}
    found: dict[str, Any] = {**_estimates(scores)}
    ratio = found.get("perplexity_ratio")
    recovery = 1 / ratio.value if ratio else None
    relative = lm_tasks.recovery(tasks)
    if recovery is not None and relative is not None:
        recovery = min(recovery, relative)
    counts = settings.get("texts", {})
    parts = scores.split(list(counts.values())) if len(counts) > 1 else []
    return Evaluation(
        model,
        baseline,
        **found,
        recovery=recovery,
        tasks=tasks,
        texts={text: _estimates(part) for text, part in zip(counts, parts, strict=False)},
        windows=per_window,
        settings=settings,
    )


def _estimates(scores: Scores) -> dict[str, Estimate]:
    """The numbers of an `Evaluation`, by their names there; without a baseline only the first."""
    found = {"perplexity": exponential(estimate(scores.nll))}
    if scores.baseline_nll is not None:
        found["baseline_perplexity"] = exponential(estimate(scores.baseline_nll))
        found["perplexity_ratio"] = exponential(estimate(scores.nll - scores.baseline_nll))
    if scores.kl is not None:
        found["kl"] = estimate(scores.kl)
    if scores.agree is not None:
        found["top1"] = estimate(scores.agree)
    return found


@dataclass(frozen=True)
class _Run:
    """One evaluation's settings for loading, and its steps."""

    device_map: str
    dtype: str
    trust_remote_code: bool
    progress: Progress | None

    def tokens(
        self,
        source: Source,
        reference: Source | None,
        texts: list[str],
        count: int | None,
        length: int,
        context: int = 0,
    ) -> list[Tensor]:
        """Windows of token ids [windows, length] of each text, the same for both models."""
        share = max(1, (count or MOST_WINDOWS) // len(texts))
        wanted = {"count": share, "length": length, "fewest": 1 if count is None else share, "overlap": context}
        found = [self._windows(source, text, wanted) for text in texts]
        vocabulary = _vocabulary(source)
        if reference is not None:
            both = f"{source.model} and {reference.model}"
            needed = "the baseline is the model that the other was made from"
            other = [self._windows(reference, text, wanted) for text in texts]
            if not all(map(torch.equal, found, other)):
                raise UsageError(f"{both} have different tokenizers; {needed}")
            if vocabulary != _vocabulary(reference):
                sizes = f"{vocabulary} and {_vocabulary(reference)} tokens"
                raise UsageError(f"{both} have vocabularies of {sizes}; {needed}")
        largest = max(int(part.max()) for part in found)
        if vocabulary is not None and largest >= vocabulary:
            raise UsageError(f"{source.model}: its tokenizer gives token {largest}, its vocabulary has {vocabulary}")
        return found

    def _windows(self, source: Source, text: str, wanted: dict[str, int]) -> Tensor:
        try:
            tokenizer = data.load_tokenizer(source.folder, trust_remote_code=self.trust_remote_code)
            return data.windows(text, tokenizer, "evaluation", **wanted)
        except data.DataError as error:
            raise UsageError(str(error)) from None

    def load(self, source: Source, kv: str | None = "none", attention: str | None = None) -> Any:
        where = None if self.device_map == "auto" and not torch.cuda.is_available() else self.device_map
        dtype = self.dtype if self.dtype == "auto" else DTYPES[self.dtype]
        options = {"trust_remote_code": True} if self.trust_remote_code else {}
        return hf.load(source.folder, device_map=where, dtype=dtype, kv=kv, attention=attention, **options).eval()

    def write(self, source: Source, reference: Source | None, load: Callable[[], Any]) -> dict[str, dict[str, Any]]:
        """What the model writes, and its baseline."""
        options = {"trust_remote_code": self.trust_remote_code}
        found = {"model": generation.write(source.folder, load, **options)}
        if reference is not None:
            found["baseline"] = generation.write(reference.folder, partial(self.load, reference), **options)
        return {who: asdict(text) for who, text in found.items()}

    def baseline(self, source: Source, tokens: Tensor) -> Baseline:
        """Run the baseline over all windows, or read what an earlier run left."""
        if config_of_quantization(source.config) is not None:
            how = "give the original model, or write it back with `quantlab convert --to bf16`"
            raise UsageError(f"{source.model}: the baseline is itself quantized; {how}")
        on_gpu = torch.cuda.is_available() and self.device_map != "cpu"
        settings = {"dtype": self.dtype, "gpu": torch.cuda.get_device_name() if on_gpu else None, **_versions()}
        file = baselines.cache_file(source, tokens, settings)
        hidden = baselines.read(file, tokens)
        cached = hidden is not None
        if hidden is None:
            hidden = torch.cat([part[:, :-1].cpu() for _, part in self._hidden_states(self.load(source), tokens)])
            gc.collect()  # a model that accelerate has spread holds itself in cycles, and the next one needs its place
            baselines.write(file, hidden)
        return Baseline(source, hidden, cached, self.trust_remote_code)

    def score(self, model: Any, tokens: Tensor, kept: Baseline | None) -> Scores:
        """Scores of all windows, against the baseline if there is one."""
        from quantlab.attention import always

        base_head: Logits | None = None
        rows: list[tuple[Tensor, ...]] = []
        with always():
            for batch, hidden in self._hidden_states(model, tokens):
                if kept is not None and base_head is None:
                    base_head = kept.head(hidden.device)
                for window, states in zip(batch, hidden, strict=True):
                    base_states = kept.hidden[len(rows)] if kept else None
                    rows.append(score_window(window, states, head_of(model), base_states, base_head))
        return Scores(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _hidden_states(self, model: Any, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of windows [rows, length] and their last hidden states [rows, length, hidden]."""
        done = 0
        for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
            yield batch, hidden_states(model, batch.to(model.device))
            done += len(batch)
            if self.progress is not None:
                self.progress(f"{Path(model.name_or_path).name}: {len(tokens)} windows", done, len(tokens))


def _kv_of(model: Any) -> str:
    return model.quantlab_kv.kv.format if hasattr(model, "quantlab_kv") else "none"


def _check_arguments(
    baseline: Any,
    text: Any,
    device_map: str,
    dtype: str,
    windows: int | None,
    length: int | None,
    min_recovery: float | None,
    baseline_revision: str | None,
) -> None:
    """Raise UsageError for what can be seen without opening a model."""
    for path in _listed(text):
        if path != "bundled" and not Path(path).expanduser().is_file():
            raise UsageError(f"no such file: {path}; give a text or JSONL file (data sets go by --dataset)")
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r}; {did_you_mean(dtype, ['auto', *DTYPES])}")
    if not re.fullmatch(r"auto|balanced(_low_0)?|sequential|cpu|cuda(:\d+)?", device_map):
        raise UsageError(f"device map {device_map!r}; known: auto, balanced, sequential, cpu, cuda, cuda:N.")
    if device_map.startswith("cuda"):
        pick_device(device_map)  # refuses a GPU that is not there
    if length is not None and length < 2:
        raise UsageError(f"windows of {length} tokens: needs 2 at least, the first is context only")
    if windows is not None and windows < 1:
        raise UsageError(f"{windows} windows: needs one at least, or None for all")
    if min_recovery is not None and not 0 < min_recovery <= 1:
        raise UsageError(f"min_recovery = {min_recovery}: needs a part between 0 and 1, such as 0.99")
    if min_recovery is not None and baseline is None:
        raise UsageError("min_recovery needs a baseline to compare with; give the model that this one was made from")
    if baseline_revision is not None and baseline is None:
        raise UsageError(f"baseline_revision = {baseline_revision!r} is of a baseline; give its hub id as well")


def _fitting_length(source: Source, given: int | None) -> int:
    """Tokens per window. Positions that a model was not trained for would measure nothing."""
    context = context_length(source.config) or LENGTH
    if given is not None and given > context:
        raise UsageError(
            f"windows of {given} tokens: {source.model} has a context of {context}; give --length {context}"
        )
    return given or min(LENGTH, context)


def _listed(given: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(given)] if isinstance(given, str | Path) else [str(item) for item in given]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _vocabulary(source: Source) -> int | None:
    text = source.config.get("text_config") or {}
    return source.config.get("vocab_size", text.get("vocab_size"))


def _gate(evaluation: Evaluation, least: float | None) -> None:
    if least is not None and evaluation.recovery is not None and evaluation.recovery < least:
        raise VerificationError(
            f"{evaluation.model}: recovery {evaluation.recovery:.4f} is below the required {least}; leave sensitive "
            f"layers alone (--ignore), calibrate (--calib), or choose a scheme of more bits"
        )


def _save(evaluation: Evaluation, source: Source, output: str | Path | None) -> None:
    """Where it is asked for, and beside the checkpoint if it is one of ours; folders of others are not written to."""
    text = json.dumps(evaluation.to_dict(), indent=2) + "\n"
    folder = source.folder / OURS
    if folder.is_dir() and os.access(folder, os.W_OK):
        write_file(folder / "eval.json", text)
    if output is not None:
        write_file(Path(output), text)


def _versions() -> dict[str, str]:
    """Of everything that decides the numbers."""
    import transformers

    try:
        ours = metadata.version("quantlab-toolkit")
    except metadata.PackageNotFoundError:  # run from a source checkout
        ours = "source"
    return {
        "quantlab": ours,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
