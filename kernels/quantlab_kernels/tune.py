"""Search the fastest configuration of a room: ``python -m quantlab_kernels.tune ROOM [--shape NxK]``.

The Triton backend's, of the INT4 rooms the Hopper backend's.

Writes the room's table for the present GPU, to be reviewed and committed; `common.tuning` says how it is read.
Configurations are compiled by many processes first, since compiling takes far longer than timing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quantlab_kernels.bench import environment
from quantlab_kernels.common import gemm_configs, tuning
from quantlab_kernels.common.cases import TOKENS, WEIGHTS
from quantlab_kernels.common.gemm import GemmProblem, empty_group_scale
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.int4 import GROUP, Int4Problem, repack_int4
from quantlab_kernels.common.nvrtc import CompileError, compile_all
from quantlab_kernels.common.timing import measure, rotations
from quantlab_kernels.packing import pack_int4

ROOMS = ("gemm_fp8_block", "gemm_int4", "gemm_int4_fp8", "quantize_fp8")
INT4 = {"gemm_int4": torch.bfloat16, "gemm_int4_fp8": torch.float8_e4m3fn}  # dtypes of the activations
Task = tuple[str, Any, Any]  # room, problem, config


def tune(room: str, shapes: Sequence[tuple[int, int]] = (), *, progress: Callable[[str], None] = print) -> Path:
    """Time every candidate for each (N, K) of `shapes` (the room's own list when empty) and write the winners.

    Returns the table's path. Raises RuntimeError without a GPU that the room tunes for and ValueError for a room
    without a table.
    """
    if room not in ROOMS:
        raise ValueError(f"no room {room!r} with a tuning table; there are {', '.join(ROOMS)}")
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a CUDA device")
    if room in INT4 and gpu().sm != 90:
        raise RuntimeError(f"{room} is tuned on sm_90, this GPU is sm_{gpu().sm}; its Triton backend has no table")
    work = list(_work(room, shapes))
    _compile([(room, problem, config) for _, _, problem, configs in work for config in configs])
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for table, shape, problem, configs in work:
        best, us, untuned_us = _fastest(room, problem, configs)
        tables.setdefault(table, {}).setdefault(shape, {})[str(problem.m)] = asdict(best)
        progress(f"{problem}: {us:.1f} us, untuned {untuned_us:.1f} us, {best}")
    for table, entries in tables.items():
        path = tuning.save(room, gpu().slug, environment(), table, entries)
    return path


def _work(room: str, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str, Any, list[Any]]]:
    """(name of the table, key of the shape, problem, candidates with the untuned default first)."""
    if room == "quantize_fp8":
        from quantlab_kernels.quantize_fp8 import configs
        from quantlab_kernels.quantize_fp8.op import Problem

        for granularity in ("group", "token", "block"):
            for k in sorted({k for _, k in shapes} or {4096, 8192, 14336}):
                for m in (1, 16, 256, 4096):
                    problem = Problem(granularity, m, k, sm=gpu().sm)
                    default = configs.default(problem)
                    tried = dict.fromkeys([default, *configs.candidates(problem)])
                    yield granularity, f"N=0,K={k}", problem, list(tried)
        return
    if room in INT4:
        yield from _int4_work(room, shapes)
        return
    for n, k in shapes or WEIGHTS.values():
        for m in TOKENS:
            gemm = GemmProblem(m, n, k, sm=gpu().sm)
            tried_configs = dict.fromkeys([gemm_configs.default(gemm), *gemm_configs.candidates(gemm)])
            yield "triton", f"N={n},K={k}", gemm, list(tried_configs)


def _int4_work(room: str, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str, Any, list[Any]]]:
    from quantlab_kernels.gemm_int4_fp8 import sm90_configs

    for n, k in shapes or WEIGHTS.values():
        for m in TOKENS:
            problem = Int4Problem(m, n, k, INT4[room], grouped=room == "gemm_int4_fp8")
            tried = dict.fromkeys([sm90_configs.default(problem), *sm90_configs.candidates(problem)])
            yield "sm90", f"N={n},K={k}", problem, list(tried)


def _fastest(room: str, problem: Any, configs: list[Any]) -> tuple[Any, float, float]:
    """(best configuration, its time, the time of the first one); two rounds, the second among the five best."""
    bytes_per_call = problem.bytes(0) if isinstance(problem, GemmProblem) else problem.bytes
    sets = [_inputs(room, problem, seed) for seed in range(rotations(bytes_per_call, gpu().l2_bytes))]
    configs = [config for config in configs if _runs(room, problem, config, sets[0])]
    calls = {config: _calls(room, problem, config, sets) for config in configs}
    first = measure(calls, rounds=3)
    shortlist = sorted(configs, key=lambda config: first[config].median_us)[:5]
    final = measure({config: calls[config] for config in {configs[0]: 0, **dict.fromkeys(shortlist)}}, rounds=9)
    best = min(final, key=lambda config: final[config].median_us)
    return best, final[best].median_us, final[configs[0]].median_us


def _calls(room: str, problem: Any, config: Any, sets: list[tuple[Any, ...]]) -> list[Callable[[], None]]:
    return [lambda inputs=inputs: _launch(room, problem, config, inputs) for inputs in sets]  # type: ignore[misc]


def _runs(room: str, problem: Any, config: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether the compiler finds registers and shared memory for it: `reject` only estimates them."""
    from triton.errors import TritonError

    try:
        _launch(room, problem, config, inputs)
    except (TritonError, CompileError) as error:
        print(f"{problem}: left out {config}: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def _launch(room: str, problem: Any, config: Any, inputs: tuple[Any, ...]) -> None:
    if room == "quantize_fp8":
        from quantlab_kernels.quantize_fp8 import triton as backend

        backend.launch(problem, inputs[0], None, inputs[1], inputs[2], config)
    elif room in INT4:
        from quantlab_kernels.gemm_int4_fp8 import sm90

        a, a_scale, b, b_scale, out = inputs
        sm90.launch(a, a_scale, b, b_scale, None, out, config)
    else:
        from quantlab_kernels.common import triton_gemm

        native = problem.sm >= 89
        a, a_scale, b, b_scale, out = inputs
        triton_gemm.launch(a, a_scale, b, b_scale, None, out, config, blocked=room == "gemm_fp8_block", native=native)


def _inputs(room: str, problem: Any, seed: int) -> tuple[Any, ...]:
    """Tensors of one call, results included, of random codes; their values do not matter, that they vary does."""
    generator = torch.Generator("cuda").manual_seed(seed)
    if room == "quantize_fp8":
        from quantlab_kernels.quantize_fp8.op import _empty

        x = torch.randn(problem.m, problem.k, device="cuda", dtype=problem.dtype, generator=generator)
        return x, *_empty(problem.granularity, x)
    m, n, k = problem.m, problem.n, problem.k
    if room in INT4:
        return _int4_inputs(problem, generator)
    a, b = (torch.randn(rows, k, device="cuda", generator=generator).to(torch.float8_e4m3fn) for rows in (m, n))
    if room == "gemm_fp8_block":
        a_scale = empty_group_scale(a, m, k // 128).fill_(1.0)
        b_scale = torch.ones(-(-n // 128), k // 128, device="cuda")
    else:
        a_scale, b_scale = torch.ones(m, 1, device="cuda"), torch.ones(n, 1, device="cuda")
    return a, a_scale, b, b_scale, torch.empty(m, n, device="cuda", dtype=problem.out_dtype)


def _int4_inputs(problem: Int4Problem, generator: torch.Generator) -> tuple[Any, ...]:
    m, n, k, fp8 = problem.m, problem.n, problem.k, problem.x.itemsize == 1
    a = torch.randn(m, k, device="cuda", generator=generator).to(problem.x)
    a_scale = empty_group_scale(a, m, k // GROUP).fill_(1.0) if fp8 else None
    words = pack_int4(torch.randint(-7, 8, (n, k), dtype=torch.int8, device="cuda", generator=generator))
    b_scale = empty_group_scale(words, n, k // GROUP, problem.scale).fill_(0.01)
    b = repack_int4(words, activation_bits=8 if fp8 else 16)
    return a, a_scale, b, b_scale, torch.empty(m, n, device="cuda", dtype=problem.out_dtype)


def _compile(tasks: list[Task]) -> None:
    """Fill the disk caches: Triton's from many processes."""
    if tasks[0][0] in INT4:
        from quantlab_kernels.gemm_int4_fp8 import sm90

        compile_all(sm90.source(config, problem) for _, problem, config in tasks)
        return
    unique = {(room, config, problem.m == 1, getattr(problem, "granularity", "")): (room, problem, config)
              for room, problem, config in tasks}  # fmt: skip
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    shares = [list(unique.values())[worker::workers] for worker in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_share, shares))


def _compile_share(tasks: list[Task]) -> None:
    for room, problem, config in tasks:
        _runs(room, problem, config, _inputs(room, problem, 0))
    torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quantlab_kernels.tune", description="Tune a room on this GPU.")
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--shape", action="append", default=[], metavar="NxK", help="one layer; repeatable")
    options = parser.parse_args(arguments)
    shapes = [(int(n), int(k)) for n, _, k in (text.partition("x") for text in options.shape)]
    try:
        print(f"wrote {tune(options.room, shapes)}")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
