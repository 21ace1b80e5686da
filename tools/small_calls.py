"""Small calls of every CUDA kernel in each of its kinds, for a checker: `python tools/small_calls.py ROOM`.

Shapes are ragged and small, since a checker follows each instruction. Rings are so short, or CTAs so few, that rings
go round and accumulators are used again. Every call is made twice: the second time its weights are known, and loaded
early. Results are compared with the same call on the CPU, so that a kernel which does nothing does not pass.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import quantlab_kernels as ql
from quantlab_kernels.common import nvrtc
from quantlab_kernels.common.gemm import GemmProblem, as_group_scale
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.int4 import Int4Problem, repack_int4
from quantlab_kernels.common.kv import KVFormat
from quantlab_kernels.common.latent import LatentFormat
from quantlab_kernels.gemm_fp8_block import sm90, sm90_configs, sm90_few
from quantlab_kernels.gemm_fp8_grouped import sm90 as sm90_grouped
from quantlab_kernels.gemm_int4_fp8 import sm90 as sm90_int4
from quantlab_kernels.gemm_int4_fp8 import sm90_configs as int4_configs
from quantlab_kernels.gemm_int4_grouped import sm90 as sm90_int4_grouped
from quantlab_kernels.mla_decode import sm90 as sm90_latents
from quantlab_kernels.mla_decode import sm90_rows
from quantlab_kernels.mla_decode.op import BACKENDS as LATENT_BACKENDS
from quantlab_kernels.moe_route.op import Rule
from quantlab_kernels.packing import pack_int4

PROCESSORS = 8  # that launches are made for: few CTAs, which take several tiles each
ROWS = (1, 17, 70, 200)  # by way of the configurations for few, some and many tokens
N, K = 264, 1536  # K: whole rings of three and of four blocks
BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


class Call(NamedTuple):
    """`run` on the GPU's copies of `inputs` gives nearly `exact`."""

    label: str
    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    exact: Tensor


Calls = Iterator[Call]


def of_op(label: str, op: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """The op runs on the CPU too."""
    return Call(label, op, inputs, op(*inputs))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=BF16)


def nans(m: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.full((m, n), torch.nan, dtype=dtype, device="cuda")


def fp8_operands(m: int, row: int = 0) -> tuple[Tensor, ...]:
    if row:
        return *ql.quantize_fp8_token(randn(m, K)), *ql.quantize_fp8_token(randn(N, K))
    return *ql.quantize_fp8_group(randn(m, K)), *ql.quantize_fp8_block(randn(N, K))


def fp8_op(row: int) -> Calls:
    op = ql.gemm_fp8_row if row else ql.gemm_fp8_block
    for m in ROWS:
        yield of_op(f"{m} tokens", op, *fp8_operands(m, row))


def short(config: sm90_configs.Config) -> sm90_configs.Config:
    """With a ring that goes round; an unrolled one is short."""
    return config if config.unroll else replace(config, stages=min(config.stages, 3))


def fp8_kinds(m: int, dtype: torch.dtype, row: int, chosen: Callable[[sm90_configs.Config], bool]) -> Calls:
    """Every kind of configuration that `chosen` takes; results that have room for it get a bias."""
    operands, bias = fp8_operands(m, row), torch.linspace(-1, 1, N)
    op = ql.gemm_fp8_row if row else ql.gemm_fp8_block
    exact = op(*operands, bias, out_dtype=FP32)
    kinds = map(short, sm90_configs.candidates(GemmProblem(m, N, K, dtype, FP32)))
    for config in dict.fromkeys(replace(c, row=row) for c in kinds if chosen(c)):

        def run(a: Tensor, a_scale: Tensor, *weight: Tensor, config: sm90_configs.Config = config) -> Tensor:
            out, scale = nans(m, N, dtype), a_scale if row else as_group_scale(a_scale)
            sm90.launch(a, scale, *weight, out, config)
            return out

        yield Call(f"{m} tokens, {config}", run, (*operands, bias), exact)


def few(row: int, int4: bool = False) -> Calls:
    """Every kind of the kernel for few tokens."""
    for m in (3, 16):
        a, a_scale, *weight = fp8_operands(m, row)
        if int4:
            weight = list(int4_weight(8))
        exact = (ql.gemm_int4_fp8 if int4 else ql.gemm_fp8_row if row else ql.gemm_fp8_block)(a, a_scale, *weight)
        for config in sm90_few.every_kind(sm90_few.Config(tokens=8 if m <= 8 else 16, row=row)):

            def run(a: Tensor, a_scale: Tensor, *weight: Tensor, config: sm90_few.Config = config) -> Tensor:
                out, scale = nans(a.shape[0], N, BF16), a_scale if config.row else as_group_scale(a_scale)
                sm90_few.launch(a, scale, *weight, None, out, config, int4)
                return out

            yield Call(f"{m} tokens, {config}", run, (a, a_scale, *weight), exact)


def counts_of(m: int) -> Tensor:
    return torch.tensor([m // 3, 0, m - m // 3])


def fp8_experts(m: int, row: int = 0) -> tuple[Tensor, ...]:
    codes, scale = ql.quantize_fp8_token(randn(3 * 256, K)) if row else ql.quantize_fp8_block(randn(3 * 256, K))
    a = ql.quantize_fp8_token(randn(m, K)) if row else ql.quantize_fp8_group(randn(m, K))
    return *a, codes.view(3, 256, K), scale.view(3, -1, scale.shape[1]), counts_of(m)


def fp8_grouped() -> Calls:
    for m in ROWS:
        yield of_op(f"{m} rows", ql.gemm_fp8_grouped, *fp8_experts(m))
    base = sm90_configs.Config(grouped=1, stages=3)
    tall = replace(base, math_groups=3, stages=4, pieces=2, group=3)
    kinds = [replace(base, temps=2), tall, replace(tall, rotate=1, unroll=1), replace(base, temps=2, output_tma=0)]
    kinds += [replace(base, by=192), replace(base, math_groups=1, temps=2, by=64)]
    kinds += [replace(base, by=by, swap=1, output_tma=0) for by in (16, 32, 64)]
    for row in (0, 1):
        operands = fp8_experts(300, row)
        exact = ql.gemm_fp8_grouped(*operands)
        for config in (replace(kind, row=row) for kind in kinds):

            def run(a: Tensor, a_scale: Tensor, *others: Tensor, config: sm90_configs.Config = config) -> Tensor:
                out, scale = nans(300, 256, BF16), a_scale if config.row else as_group_scale(a_scale)
                sm90_grouped.launch(a, scale, *others, out, config)
                return out

            yield Call(f"300 rows, {config}", run, operands, exact)


def absorbed() -> Calls:
    """Heads whose slices and blocks of scales meet everywhere, in halves, and in quarters of blocks."""
    os.environ["QUANTLAB_BMM_FP8_BACKEND"] = "sm90"
    for rows, m in ((256, 70), (192, 17), (224, 1), (224, 70)):

        def run(x: Tensor, w: Tensor, scale: Tensor, rows: int = rows) -> Tensor:
            latent = ql.bmm_fp8(x, w, scale, first=0, count=128)
            return ql.bmm_fp8(latent, w, scale, first=128, count=rows - 128, transposed=True)

        yield of_op(f"{m} tokens, {rows} rows", run, randn(m, 3, 128), *ql.quantize_fp8_block(randn(3 * rows, K)))


def int4_weight(bits: int, n: int = N) -> tuple[Tensor, Tensor]:
    """Tiles and scales."""
    words = pack_int4(torch.randint(-7, 8, (n, K), dtype=torch.int8))
    scale = torch.rand(n, K // 128).add(0.5).bfloat16()
    return repack_int4(words, activation_bits=bits), as_group_scale(scale)


def int4_tokens(m: int, form: str) -> tuple[Tensor, ...]:
    x = randn(m, K)
    return {"wide": lambda x: (x,), "row": ql.quantize_fp8_token, "group": ql.quantize_fp8_group}[form](x)


def int4_op(form: str) -> Calls:
    for m in ROWS:
        op, bits = (ql.gemm_int4, 16) if form == "wide" else (ql.gemm_int4_fp8, 8)
        yield of_op(f"{m} tokens", op, *int4_tokens(m, form), *int4_weight(bits))


def short_int4(config: int4_configs.Config) -> int4_configs.Config:
    """With a ring of two stages for each group, or of three."""
    return replace(config, stages=min(config.stages, max(3, 2 * config.k_groups)))


def int4_kinds(m: int, form: str, streams: tuple[int, ...] = (0, 1, 2)) -> Calls:
    """Every kind of configuration, those of other schedules as far as `streams` says."""
    wide, grouped = form == "wide", form == "group"
    *tokens, = int4_tokens(m, form)  # fmt: skip
    weight = int4_weight(16 if wide else 8)
    exact = (ql.gemm_int4 if wide else ql.gemm_int4_fp8)(*tokens, *weight)
    problem = Int4Problem(m, N, K, BF16 if wide else FP8, BF16, grouped=grouped)
    kinds = [c for c in int4_configs.candidates(problem) if c.split > 1 or c.stream in streams]
    if grouped:
        kinds += [int4_configs.default(problem), replace(int4_configs.default(problem), early=1, token_scales=0)]
    for config in dict.fromkeys(short_int4(c) for c in kinds):

        def run(x: Tensor, *others: Tensor, config: int4_configs.Config = config) -> Tensor:
            out = nans(m, N, BF16)
            *scale, tiles, weight_scale = others
            token_scale = None if wide else as_group_scale(scale[0]) if grouped else scale[0]
            sm90_int4.launch(x, token_scale, tiles, as_group_scale(weight_scale), None, out, config)
            return out

        yield Call(f"{m} tokens, {config}", run, (*tokens, *weight), exact)


def int4_experts(m: int, form: str) -> tuple[Tensor, ...]:
    """A scale of each token or group too, which 16-bit tokens have none of."""
    tiles, scale = zip(*(int4_weight(16 if form == "wide" else 8, 256) for _ in range(3)), strict=True)
    return *int4_tokens(m, form), torch.stack(tiles), torch.stack(scale), counts_of(m)


def int4_grouped() -> Calls:
    for form in ("group", "row", "wide"):
        wide = form == "wide"

        def op(a: Tensor, *others: Tensor, wide: bool = wide) -> Tensor:
            *scale, tiles, weight_scale, counts = others
            return ql.gemm_int4_grouped(a, None if wide else scale[0], tiles, weight_scale, counts)

        for m in (30, 300):
            operands = int4_experts(m, form)
            yield of_op(f"{m} rows", op, *operands)
        exact = op(*operands)
        problem = Int4Problem(300, 256, K, BF16 if wide else FP8, BF16, grouped=form == "group", experts=3)
        kinds = [int4_configs.Config(4, 1, by, prefetch=0, stream=0, early=early) for by, early in ((16, 1), (64, 0))]
        kinds += [int4_configs.Config(2, 2, 32, prefetch=0, stream=0)]
        kinds += [int4_configs.Config(groups, 1, 128, prefetch=0, stream=0) for groups in (2, 3)]
        for config in map(short_int4, kinds):
            if int4_configs.reject(config, problem):
                continue

            def run(a: Tensor, *others: Tensor, config: int4_configs.Config = config, form: str = form) -> Tensor:
                *scale, tiles, weight_scale, counts = others
                token_scale = None if not scale else as_group_scale(scale[0]) if form == "group" else scale[0]
                out = nans(300, 256, BF16)
                sm90_int4_grouped.launch(a, token_scale, tiles, columns(weight_scale), counts, out, config)
                return out

            yield Call(f"300 rows, {form}, {config}", run, operands, exact)


def columns(scale: Tensor) -> Tensor:
    """Scales of all experts [E, N, G] as the columns of one matrix."""
    experts, n, _ = scale.shape
    return as_group_scale(scale.flatten(0, 1)).unflatten(0, (experts, n))


def attend(label: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor, **options: Any) -> Call:
    """`others`: in the order of `names`."""
    names = [name for name, value in options.items() if value is ...]

    def run(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
        return ql.attention_8bit(q, k, v, **options | dict(zip(names, others, strict=True)))[0]

    return of_op(label, run, q, k, v, *others)


def prefill() -> Calls:
    for m in ROWS:
        q, k, v = randn(1, 4, m, 128), randn(1, 2, m, 128), randn(1, 2, m, 128)
        yield attend(f"{m} tokens", q, k, v, causal=True)
    yield attend("more keys", randn(2, 4, 140, 128), randn(2, 2, 900, 128), randn(2, 2, 900, 128), causal=True)


def prefill_options() -> Calls:
    q, k, v = randn(2, 4, 700, 64), randn(2, 2, 700, 64), randn(2, 2, 700, 64)
    given = torch.linspace(-1, 1, 4), torch.tensor([[0, 690], [77, 700]], dtype=torch.int32)
    yield attend(
        "window", q, k, v, *given, sinks=..., key_range=..., causal=True, window=300, softcap=20.0, qk="fp8", pv="fp8"
    )  # fmt: skip
    angles = torch.arange(700)[None, :, None] * torch.logspace(0, -3, 32)
    turning = torch.cat((angles, angles), 2)
    for interleaved in (False, True):
        tables = turning.cos().to(BF16), turning.sin().to(BF16)
        yield attend("rotated", q, k, v, *tables, cos=..., sin=..., interleaved=interleaved, causal=True)
    ends = torch.tensor([0, 130, 131, 500], dtype=torch.int32)
    for d, form in ((96, "fp8"), (80, "int8")):
        q, k, v = randn(1, 4, 500, d), randn(1, 2, 500, d), randn(1, 2, 500, d)
        yield attend("packed", q, k, v, ends, ends, cu_seqlens_q=..., cu_seqlens_k=..., qk=form, causal=True)


def places_of(table: Tensor, length: Tensor, tokens: int, page: int) -> Tensor:
    """Slots in its pages of each sequence's newest `tokens`; -1 for those before its first."""
    position = torch.arange(tokens, device=table.device) - (tokens - length.long()[:, None])
    places = table.long().gather(1, position.clamp(0) // page) * page + position.clamp(0) % page
    return torch.where(position < 0, -1, places)


def decode(format: KVFormat, d: int) -> Calls:
    """A sequence for few CTAs, one for many, as many heads as fill nearly all processors in a cache of long sequences,
    pages, and a ring with the newest tokens in 16 bits."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, length: Tensor, table: Tensor | None = None, longest: int | None = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        slots, places = max(k.shape[2], longest or 0), None
        if table is not None:
            slots = 32
            places = places_of(table, length, k.shape[2], slots)
        elif options.get("ring"):
            slots = 256
        rows = k.shape[0] if table is None else table.numel()
        cache_options = {name: options.pop(name) for name in ("ring", "first", "newest") if name in options}
        cache = ql.PackedKV.empty(format, rows, k.shape[1], slots, d, device=k.device, **cache_options)
        ql.kv_append(k, v, cache, length, slots=places)
        return ql.attention_decode(q, cache, length, block_table=table, longest=longest, **options)[0]

    def call(label: str, group: int, lengths: tuple[int, ...], *table: Tensor, sq: int = 1, **options: Any) -> Call:
        batch, tokens = len(lengths), max(lengths)
        tensors = randn(batch, 2 * group, sq, d), randn(batch, 2, tokens, d), randn(batch, 2, tokens, d)
        given = functools.partial(run, **options)
        return of_op(label, given, *tensors, torch.tensor(lengths, dtype=torch.int32), *table)

    yield call("few CTAs", 4, (2900,), longest=256)
    yield call("many CTAs", 4, (1300,), longest=1300)
    yield call("a CTA for each head", 4, tuple(range(1, 145, 3)), longest=5000)
    yield call("ragged, rows in two tiles", 9, (1, 0, 64, 200), sq=2, softcap=20.0)
    pages = torch.randperm(20).view(2, 10).to(torch.int32)
    yield call("pages", 4, (300, 77), pages)
    yield call("ring", 2, (500, 90), ring=True, first=4, newest=64, window=200)


@contextlib.contextmanager
def tiles_of(rows: int, wide: bool) -> Iterator[None]:
    """Latent attention in tiles of so many rows, whatever would be quickest or was chosen for such a call before; wide
    ones by `sm90_rows` where it can."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(LATENT_BACKENDS._chosen, clear=True))
        for module in (sm90_latents, sm90_rows):
            stack.enter_context(mock.patch.object(module, "row_tile", return_value=rows))
            stack.enter_context(mock.patch.object(module, "config", module.config.__wrapped__))
        stack.enter_context(mock.patch.object(sm90_rows, "wide_tiles", return_value=(rows,) if wide else ()))
        yield


def latents(format: LatentFormat, heads: int, tile: int, wide: bool, rank: int = 512) -> Calls:
    """One sequence for few CTAs of many tiles of tokens, short ones, of many parts, and pages."""

    def run(
        q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, length: Tensor, table: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:  # fmt: skip
        rows, slots, places = latent.shape[0], latent.shape[1], None
        if table is not None:
            rows, slots = table.numel(), 32
            places = places_of(table, length, latent.shape[1], slots)
        cache = ql.PackedLatent.empty(format, rows, slots, rank, 64, device=latent.device)
        ql.mla_append(latent, rope, cache, length, slots=places)
        with tiles_of(tile, wide):
            return ql.mla_decode(
                q_latent, q_rope, cache, length, scale=1.2 / rank**0.5, block_table=table, longest=longest
            )[0]  # fmt: skip

    def call(label: str, lengths: tuple[int, ...], *table: Tensor, longest: int | None = None) -> Call:
        batch, tokens = len(lengths), max(lengths)
        queries = randn(batch, 1, heads, rank), randn(batch, 1, heads, 64)
        given = functools.partial(run, longest=longest)
        length = torch.tensor(lengths, dtype=torch.int32)
        return of_op(label, given, *queries, randn(batch, tokens, rank), randn(batch, tokens, 64), length, *table)

    yield call("many tiles", (1600,), longest=256)
    yield call("short", (1, 0, 64, 65, 200))
    yield call("many parts", (2112,))
    yield call("whose rows are divided too", (4096,))
    yield call("pages", (300, 77), torch.randperm(20).view(2, 10).to(torch.int32))


def route() -> Calls:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rule = Rule(4, sigmoid=True, groups=8, kept=4, best=2, normalized=True, shared=1)
        return ql.moe_route(x, weight, rule, bias=bias)[1]

    for m in ROWS:
        yield of_op(f"{m} tokens", run, randn(m, 512), randn(64, 512) * 0.05, torch.rand(64))


def swapped(config: sm90_configs.Config) -> bool:
    return config.swap == 1


def of_64_rows(config: sm90_configs.Config) -> bool:
    return config.swap == 1 or config.math_groups == 1


def straight(config: sm90_configs.Config) -> bool:
    return config.swap == 0


def one_by_one(*rooms: Callable[[], Calls]) -> Callable[[], Calls]:
    return lambda: itertools.chain.from_iterable(room() for room in rooms)


WIDE: dict[LatentFormat, tuple[int, ...]] = {"16bit": (64,), "fp8": (24, 40, 64), "int4": (32, 48, 64), "int8": (64,)}
ROOMS: dict[str, Callable[[], Calls]] = {
    **{
        f"latents_{format}_{heads}_by_{tile}": functools.partial(latents, format, heads, tile, wide)
        for format, tiles in WIDE.items()
        for wide, calls in (
            (False, ((16, 16), (80, 16), (20, 32))),
            (True, (*((40, tile) for tile in tiles), (80, 64))),  # 80 by 64 in 16 bits: CTAs in pairs
        )
        for heads, tile in calls
    },
    "latents_rank256": one_by_one(*(functools.partial(latents, format, 40, 64, True, rank=256) for format in WIDE)),
    "fp8_block_few": functools.partial(fp8_kinds, 13, BF16, 0, swapped),
    "fp8_block_64": functools.partial(fp8_kinds, 61, BF16, 0, of_64_rows),
    "fp8_block_many": functools.partial(fp8_kinds, 400, BF16, 0, straight),
    "fp8_block_float32": functools.partial(fp8_kinds, 400, FP32, 0, straight),
    "fp8_row_64": functools.partial(fp8_kinds, 61, BF16, 1, of_64_rows),
    "fp8_row_many": functools.partial(fp8_kinds, 400, BF16, 1, straight),
    "fp8_by_itself": one_by_one(functools.partial(fp8_op, 0), functools.partial(fp8_op, 1)),
    "fp8_grouped": fp8_grouped,
    "few_block": functools.partial(few, 0),
    "few_row": functools.partial(few, 1),
    "few_int4": one_by_one(functools.partial(few, 0, int4=True), functools.partial(few, 1, int4=True)),
    "absorbed": absorbed,
    "int4_fp8_few": functools.partial(int4_kinds, 13, "group"),
    "int4_fp8_64": functools.partial(int4_kinds, 61, "row", (0, 2)),
    "int4_fp8_many": functools.partial(int4_kinds, 200, "row", (0, 1)),
    "int4_few": functools.partial(int4_kinds, 13, "wide", (0, 2)),
    "int4_many": functools.partial(int4_kinds, 200, "wide", (0, 1)),
    "int4_by_itself": one_by_one(functools.partial(int4_op, "group"), functools.partial(int4_op, "wide")),
    "int4_grouped": int4_grouped,
    "prefill": prefill,
    "prefill_options": prefill_options,
    "decode_int4": functools.partial(decode, "int4", 128),
    "decode_fp8": functools.partial(decode, "fp8", 128),
    "decode_int8": functools.partial(decode, "int8", 256),
    "decode_k8v4": functools.partial(decode, "k8v4", 64),
    "route": route,
}


def let_every_lane_arrive() -> None:
    """At barriers at which one lane arrives for its warp otherwise, see `ARRIVALS` in `common/sm90.cuh`."""
    options = nvrtc.Source.options

    def changed(source: nvrtc.Source) -> list[str]:
        texts = source.text, *(text for name, text in source.headers.items() if name != "sm90.cuh")
        return [*options(source), *(["-DEVERY_LANE"] if any("ARRIVALS" in text for text in texts) else [])]

    nvrtc.Source.options = changed  # type: ignore[method-assign]


def main() -> int:
    let_every_lane_arrive()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    object.__setattr__(gpu(0), "sm_count", PROCESSORS)
    wrong = 0
    for call in ROOMS[sys.argv[1]]():
        # Blocks of their own for all operands: a read beyond the end is then beyond an allocation.
        inputs, exact = [x.cuda() for x in call.inputs], call.exact.float()
        for turn in ("", ", again"):
            found = call.run(*inputs).float().cpu()
            error = ((found - exact).norm() / exact.norm()).item()
            right = error < 0.03  # not so NaN; formats and their rounding on Hopper cost up to 0.02
            wrong += not right
            print(f"{'right' if right else 'WRONG'} {error:.1e}: {call.label}{turn}", flush=True)
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
