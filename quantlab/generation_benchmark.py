"""Prefill and decoding of a random checkpoint in plain transformers: what ``quantlab bench generation`` times.

Every model has a process of its own, whose memory is then its alone. Compiling takes far longer than the steps that are
timed: models, and runs of the command that share a GPU, may load and compile beside each other, and are timed alone.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import re
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from quantlab.errors import UsageError
from quantlab.random_models import checkpoint, holding_gpu, shape_named, without_data, work_folder
from quantlab.summary import Progress, Table

CASES = ("prefill 1x2048", "prefill 8x2048", "decode 1x128", "decode 16x2048")
HEADER = ("case", "model", "ms", "tokens/s", "speed-up", "peak GB")
_FIRST = 16  # steps of a run that are not timed
_STEPS = 64  # that are

Times = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Model:
    """A checkpoint and how it is loaded; `scheme`, `kv` and `attention` are None for the original."""

    folder: Path
    scheme: str | None = None
    kv: str | None = None
    attention: str | None = None

    @property
    def name(self) -> str:
        ways = [f"{name} {way}" for name, way in (("KV", self.kv), ("attention", self.attention)) if way]
        return ", ".join([self.scheme or "bf16", *ways])


def generation(
    shape: str,
    schemes: Sequence[str],
    workdir: Path | None,
    *,
    cases: Sequence[str] = (),
    kv: Sequence[str] = (),
    attention: str | None = None,
    together: bool = False,
    progress: Progress | None = None,
) -> Table:
    """The original in bf16 and the model in every scheme, with every format of the cache.

    cases          see `step_times`; by default CASES
    kv, attention  of the quantized models, as in `quantlab.load`
    together       all models compile at the same time, in the memory of one GPU; else one after another
    """
    import torch

    from quantlab.pipeline import quantize

    wanted, cases = shape_named(shape), tuple(cases) or CASES
    for case in cases:
        case_of(case)
    if not torch.cuda.is_available():
        raise UsageError("generation is timed on a GPU, and there is none here")
    with work_folder(workdir) as folder:
        with holding_gpu(fcntl.LOCK_SH):
            source = checkpoint(wanted, folder / shape)
            outputs = {scheme: folder / f"{shape}-{scheme}" for scheme in schemes}
            for scheme, output in outputs.items():
                if not output.exists():
                    quantize(source, without_data(scheme), output)
            torch.cuda.empty_cache()
        models = [Model(source)]
        models += [Model(out, scheme, each, attention) for scheme, out in outputs.items() for each in kv or (None,)]
        times = _times(models, cases, len(models) if together else 1, progress)
    title = f"{shape}, random weights, plain transformers on {torch.cuda.get_device_name()}"
    return title, HEADER, _rows(cases, times)


def _times(models: list[Model], cases: Sequence[str], at_once: int, progress: Any) -> dict[str, Times]:
    """`step_times` of each model by its name, the original's first."""
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(at_once, mp_context=spawn, max_tasks_per_child=1) as pool:
        runs = {pool.submit(step_times, m.folder, cases, kv=m.kv, attention=m.attention): m.name for m in models}
        try:
            for done, run in enumerate(as_completed(runs), 1):
                _tell(progress, runs[run], run, done, len(runs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: run.result() for run, name in runs.items()}


def _tell(progress: Any, name: str, run: Future[Times], done: int, total: int) -> None:
    """Say what a run found. Raises UsageError where it found no memory."""
    try:
        found = run.result()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise UsageError(f"{name}: the GPU's memory is full; leave out --together, or take smaller cases") from None
    if progress is not None:
        progress(f"{name}: " + ", ".join(f"{case} {ms:.2f} ms" for case, (ms, _) in found.items()), done, total)


def _rows(cases: Sequence[str], times: dict[str, Times]) -> list[tuple[Any, ...]]:
    rows = []
    for case in cases:
        kind, batch, length = case_of(case)
        tokens = batch * length if kind == "prefill" else batch
        first = next(iter(times.values()))[case][0]
        for name, found in times.items():
            ms, peak = found[case]
            rows.append((case, name, f"{ms:.2f}", f"{tokens / ms * 1e3:.0f}", f"{first / ms:.2f}x", f"{peak:.1f}"))
    return rows


def case_of(text: str) -> tuple[str, int, int]:
    """("prefill" or "decode", sequences, tokens of each) of a case such as "decode 16x2048"."""
    found = re.fullmatch(r"(prefill|decode) ([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise UsageError(f"case {text!r}: needs 'prefill BxS' or 'decode BxS', for example 'decode 16x2048'")
    return found[1], int(found[2]), int(found[3])


def step_times(
    folder: Path, cases: Sequence[str] = CASES, *, kv: str | None = None, attention: str | None = None
) -> Times:
    """Milliseconds of each case on the present GPU, median of several runs, and GB of its memory at the peak.

    "prefill BxS" is one forward over B sequences of S tokens, logits of the last position, as in `generate`;
    "decode BxS" one step of `generate` with S tokens of context and more, in a static cache, for which it compiles.
    """
    with holding_gpu(fcntl.LOCK_SH):
        import torch

        from quantlab import hf

        model = hf.load(folder, dtype=torch.bfloat16, device_map="cuda", kv=kv, attention=attention).eval()
    times = {}
    for case in cases:
        kind, batch, length = case_of(case)
        run = prefill_times if kind == "prefill" else decode_times
        with torch.inference_mode():
            with holding_gpu(fcntl.LOCK_SH):
                tokens = torch.randint(3, model.config.vocab_size, (batch, length), device="cuda")
                torch.cuda.reset_peak_memory_stats()
                forget_graphs(model)
                run(model, tokens)
            with holding_gpu(fcntl.LOCK_EX):
                ms = statistics.median(run(model, tokens))
        times[case] = ms, torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.empty_cache()
    return times


def prefill_times(model: Any, tokens: Any, runs: int = 4) -> list[float]:
    """Milliseconds of each run."""
    times = []
    for _ in range(runs):
        _synchronize()
        start = time.perf_counter()
        model(tokens, use_cache=False, logits_to_keep=1)
        _synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_graphs(model: Any) -> None:
    """Let the next case compile for itself: after others there would be one graph for any shape, and their cache."""
    import torch

    torch._dynamo.reset()
    model.__dict__.pop("_previous_max_cache_length", None)


def decode_times(model: Any, tokens: Any, steps: int = _STEPS) -> list[float]:
    """Milliseconds of each step of `generate` with a static cache of its own making.

    A first run compiles and captures graphs; of the next the first steps, which may capture again, are left out.
    """
    import torch

    clock = _Clock()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        cache_implementation="static",
        min_new_tokens=_FIRST + steps,
        max_new_tokens=_FIRST + steps,
        do_sample=False,
        pad_token_id=0,
        logits_processor=[clock],
    )
    return [(after - before) * 1e3 for before, after in pairwise(clock.times[_FIRST:])]


class _Clock:
    """A logits processor that notes when it is called, once a step, and changes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.times.append(time.perf_counter())
        return scores
