"""Whole-job benchmarks on checkpoints of random weights in the shape of a real model: conversion, prefill, decode.

Random weights have a real model's sizes, so times are right; its text and its quality are not, and are not reported.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

from quantlab.errors import UsageError
from quantlab.random_models import SHAPES, Mixture, Shape, make_checkpoint
from quantlab.scheme import did_you_mean

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
_FIRST = 16  # steps of a run that are not timed
CASES = ("prefill 1x2048", "prefill 8x2048", "decode 1x128", "decode 16x2048")


def kernel_room(room: str, dry_run: bool) -> Table:
    """Time a kernel room on the present GPU, or list its cases after one call of its reference."""
    from quantlab_kernels import bench

    if room == "attention":
        return _attention(dry_run)
    if room == "mla":
        return _latents(dry_run)
    if room == "moe":
        return _experts(dry_run)
    if room not in bench.ROOMS:
        known = [*bench.ROOMS, "attention", "mla", "moe", *JOBS]
        raise UsageError(f"unknown benchmark {room!r}; {did_you_mean(room, known)}")
    if dry_run:
        return f"{room}: inputs build, the reference runs", ("case",), [(name,) for name in bench.dry_run(room)]
    rows = []
    try:
        for row in bench.run(room):
            share = "" if row.roofline is None else f"{row.roofline:.0%}"
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.ratios().items())
            figures = (f"{row.us:.1f}", f"{row.tflops:.0f}", f"{row.gb_per_s:.0f}", share)
            rows.append((row.case, row.backend, *figures, ratios))
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    header = ("case", "backend", "us", "TFLOP/s", "GB/s", "of the roofline", "time of others over ours")
    return room, header, rows


def _attention(dry_run: bool) -> Table:
    """The rooms of 8-bit attention beside their peers, then its error on the inputs by which kernels are compared."""
    from quantlab_kernels.attention_prefill import errors

    tables = [kernel_room(room, dry_run) for room in ("attention_quantize", "attention_prefill")]
    rows = [row for _, _, table in tables for row in table]
    if dry_run:
        names = dict.fromkeys(error.inputs for error in errors.report("cpu", tokens=64, lengths=(128,)))
        return "attention: inputs build, the references run", ("case",), rows + [(name,) for name in names]
    for error in errors.report():
        rows.append((error.inputs, error.operands, *4 * [""], f"RMSE {error.rms:.2e}, {error.relative:.2%}"))
    return "attention", (*tables[0][1][:-1], "time of others over ours, or error"), rows


def _latents(dry_run: bool) -> Table:
    """Both rooms of latent attention, then a decoding step of a whole layer beside transformers'."""
    from quantlab import latent_benchmark

    tables = [kernel_room(name, dry_run) for name in ("mla_append", "mla_decode")]
    rows = [row for _, _, table in tables for row in table]
    if dry_run:
        return "latent attention: inputs build, it runs", ("case",), rows + [(n,) for n in latent_benchmark.dry_run()]
    return "latent attention", tables[0][1], rows + list(latent_benchmark.run())


def _experts(dry_run: bool) -> Table:
    """Both grouped products beside their peers, then the experts of whole layers in every format."""
    from quantlab import moe_benchmark

    tables = [kernel_room(room, dry_run) for room in ("gemm_fp8_grouped", "gemm_int4_grouped")]
    rows = [row for _, _, table in tables for row in table]
    if dry_run:
        return "experts: inputs build, they run", ("case",), rows + [(name,) for name in moe_benchmark.dry_run()]
    return "experts", tables[0][1], rows + list(moe_benchmark.run())


def tune(room: str, shapes: list[tuple[int, int]]) -> Path:
    """Search the best configurations of a room on the present GPU; returns the table that was written."""
    from quantlab_kernels import tune as tuner

    try:
        return tuner.tune(room, shapes)
    except (RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from None


def conversion(shape: str, scheme: str, workdir: Path | None, **_: Any) -> Table:
    """Make a random checkpoint of this shape, quantize it, and say what each stage took."""
    from quantlab.pipeline import quantize

    wanted = shape_named(shape)
    with _folder(workdir) as folder:
        source = _checkpoint(wanted, Path(folder) / shape)
        output = Path(folder) / f"{shape}-{scheme}"
        summary = quantize(source, scheme, output, overwrite=True)
    rows: list[tuple[Any, ...]] = [
        ("whole run, seconds", f"{summary.seconds:.1f}"),
        ("source, GB", f"{summary.bytes_before / 1e9:.2f}"),
        ("output, GB", f"{summary.bytes_after / 1e9:.2f}"),
        ("device", summary.device),
        *((f"{stage}, share of the workers' time", f"{share:.0%}") for stage, share in summary.shares().items()),
        *((f"peak memory of the {where}, GB", f"{n / 1e9:.2f}") for where, n in summary.peak_bytes.items()),
    ]
    return f"conversion of {shape} to {scheme}", ("what", "value"), rows


def generation(
    shape: str,
    scheme: str,
    workdir: Path | None,
    *,
    cases: Sequence[str] = (),
    kv: str | None = None,
    attention: str | None = None,
) -> Table:
    """Prefill and decode of a random checkpoint in plain transformers, in bf16 and quantized, in one run.

    cases          see `step_times`; by default CASES
    kv, attention  of the quantized model, as in `quantlab.load`
    """
    import torch

    from quantlab.pipeline import quantize

    wanted, cases = shape_named(shape), tuple(cases) or CASES
    for case in cases:
        case_of(case)
    if not torch.cuda.is_available():
        raise UsageError("generation is timed on a GPU, and there is none here")
    with _folder(workdir) as folder:
        source = _checkpoint(wanted, Path(folder) / shape)
        output = Path(folder) / f"{shape}-{scheme}"
        if not output.exists():
            quantize(source, scheme, output)
        plain = step_times(source, cases)
        ours = step_times(output, cases, kv=kv, attention=attention)
    rows = []
    for case in cases:
        (plain_ms, plain_gb), (ours_ms, ours_gb) = plain[case], ours[case]
        rates = (f"{_tokens(case) / ms * 1e3:.0f}" for ms in (plain_ms, ours_ms))
        memory = f"{plain_gb:.1f}", f"{ours_gb:.1f}"
        rows.append((case, f"{plain_ms:.2f}", f"{ours_ms:.2f}", *rates, f"{plain_ms / ours_ms:.2f}x", *memory))
    name = ", ".join([scheme, *([f"KV {kv}"] if kv else []), *([f"attention {attention}"] if attention else [])])
    header = (
        "case",
        "bf16 ms",
        "ours ms",
        "bf16 tokens/s",
        "ours tokens/s",
        "speed-up",
        "bf16 peak GB",
        "ours peak GB",
    )
    return f"{shape}, random weights, {name}, plain transformers on {torch.cuda.get_device_name()}", header, rows


JOBS: dict[str, Callable[..., Table]] = {"conversion": conversion, "generation": generation}


def _folder(workdir: Path | None) -> Any:
    return tempfile.TemporaryDirectory(prefix="quantlab-bench-") if workdir is None else nullcontext(workdir)


def _checkpoint(shape: Shape | Mixture, folder: Path) -> Path:
    """The random checkpoint, made if it is not there yet."""
    import torch

    if not (folder / "config.json").is_file():
        make_checkpoint(shape, folder, device="cuda" if torch.cuda.is_available() else "cpu")
    return folder


def case_of(text: str) -> tuple[str, int, int]:
    """("prefill" or "decode", sequences, tokens of each) of a case such as "decode 16x2048"."""
    found = re.fullmatch(r"(prefill|decode) ([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise UsageError(f"case {text!r}: needs 'prefill BxS' or 'decode BxS', for example 'decode 16x2048'")
    return found[1], int(found[2]), int(found[3])


def _tokens(case: str) -> int:
    """Tokens that one run of a case handles."""
    kind, batch, length = case_of(case)
    return batch * length if kind == "prefill" else batch


def shape_named(name: str) -> Shape | Mixture:
    if name not in SHAPES:
        raise UsageError(f"unknown model shape {name!r}; {did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def step_times(
    folder: Path, cases: Sequence[str] = CASES, *, kv: str | None = None, attention: str | None = None
) -> dict[str, tuple[float, float]]:
    """Milliseconds of each case on the present GPU, median of several runs, and GB of its memory at the peak.

    "prefill BxS" is one forward over B sequences of S tokens, logits of the last position, as in `generate`;
    "decode BxS" one step of `generate` with S tokens of context and more, in a static cache, for which it compiles.
    """
    import torch

    from quantlab import hf

    model = hf.load(folder, dtype=torch.bfloat16, device_map="cuda", kv=kv, attention=attention).eval()
    times = {}
    for case in cases:
        kind, batch, length = case_of(case)
        tokens = torch.randint(3, model.config.vocab_size, (batch, length), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            ms = _prefill_ms(model, tokens) if kind == "prefill" else _decode_ms(model, tokens)
        times[case] = ms, torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.empty_cache()
    return times


def _prefill_ms(model: Any, tokens: Any, runs: int = 5) -> float:
    import torch

    times = []
    for _ in range(runs + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(tokens, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def _decode_ms(model: Any, tokens: Any, steps: int = 96) -> float:
    """Median milliseconds of a step of `generate` with a static cache of its own making.

    The first run compiles and captures graphs; of the second the first steps, which may capture again, do not count.
    """
    import torch

    torch._dynamo.reset()  # a graph for this case alone: after others it would be one for any shape
    model.__dict__.pop("_previous_max_cache_length", None)  # and a cache of its length, not of the longest before
    for _ in range(2):
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
    return statistics.median(after - before for before, after in pairwise(clock.times[_FIRST:])) * 1e3


class _Clock:
    """A logits processor that notes when it is called, once a step, and changes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.times.append(time.perf_counter())
        return scores
