"""Packed KV caches: appending to them, and attention over them, element by element.

Caches are filled with junk, NaN where a format has it, before tokens are written: what no query sees must not matter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from quantlab_kernels import PackedKV, attention_decode, kv_append
from quantlab_kernels.attention_decode import reference
from quantlab_kernels.attention_decode.bounds import decode_bound
from quantlab_kernels.attention_decode.op import Problem
from quantlab_kernels.attention_decode.reference import Attributes
from quantlab_kernels.attention_decode.splits import shares, splits
from quantlab_kernels.common.kv import FORMATS, dequantize_rows, quantize_rows

TENSORS = ("k", "v", "k_scale", "v_scale", "k_near", "v_near")


@dataclass(frozen=True)
class Case:
    """One call: `lengths` of the sequences, group heads share a KV head; channels: k_mean and k_channel are given.

    even  near-uniform attention over values that are far from 0, where errors of a sum do not cancel
    """

    format: str
    lengths: tuple[int, ...]
    heads: int = 2
    group: int = 4
    d: int = 64
    sq: int = 1
    page: int = 0
    first: int = 0
    newest: int = 0
    capacity: int = 0
    ring: bool = False
    start: tuple[int, ...] | None = None
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    channels: bool = True
    even: bool = False


@dataclass
class Call:
    q: Tensor
    cache: PackedKV
    length: Tensor
    start: Tensor | None
    table: Tensor | None
    sinks: Tensor | None
    case: Case = field(repr=False)

    def run(self, decode: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return decode(
            self.q, self.cache, self.length, start=self.start, block_table=self.table, window=self.case.window,
            softcap=self.case.softcap, sinks=self.sinks,
        )  # fmt: skip


def poison(cache: PackedKV) -> None:
    """NaN wherever a format has it."""
    for name in TENSORS:
        tensor = getattr(cache, name)
        if tensor is None:
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 85)


def forget_padding(cache: PackedKV, starts: tuple[int, ...]) -> None:
    """Junk in the slots before each sequence's first token."""
    for row, start in enumerate(starts):
        names = ("k", "v", "k_scale", "v_scale")
        parts = {name: None if getattr(cache, name) is None else getattr(cache, name)[row, :, :start] for name in names}
        poison(replace(cache, **parts, k_near=None, v_near=None, first=0, newest=0))


def rows(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with channels of outliers and of a large mean; k and v are right-aligned, as long as the longest."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(case.lengths), case.heads, max(*case.lengths, 1), case.d
    k, v = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * 0.3
    k[..., 3] *= 8
    k[..., 5] += 20
    v += 1.0 if case.even else 0.1
    q = torch.randn(shape[0], case.heads * case.group, case.sq, case.d, generator=generator)
    q *= 0.05 if case.even else 1.0
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def build(append: Callable[..., None], case: Case, dtype: torch.dtype, device: str) -> Call:
    """A poisoned cache to which the case's tokens are appended at once."""
    q, k, v = rows(case, dtype, device)
    batch, longest = k.shape[0], k.shape[2]
    slots_of_all = case.capacity or longest
    length = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    start = None if case.start is None else torch.tensor(case.start, dtype=torch.int32, device=device)
    table = slots = None
    if case.page:
        pages = -(-slots_of_all // case.page)
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(1)).reshape(batch, pages)
        table = order.to(device, torch.int32)
        position = torch.arange(longest, device=device) - (longest - length.long()[:, None])
        known = position.clamp(min=0)
        slots = table.long().gather(1, known // case.page) * case.page + known % case.page
        slots = torch.where(position >= 0, slots, -1)
    shape = (batch * pages + 1, case.page) if case.page else (batch, slots_of_all)
    cache = PackedKV.empty(
        case.format, shape[0], case.heads, shape[1], case.d, dtype=dtype, device=device, first=case.first,  # type: ignore[arg-type]
        newest=case.newest, ring=case.ring,
    )  # fmt: skip
    poison(cache)
    if case.channels:
        mean = k.float().mean(2)
        cache = cache.with_keys(mean, ((k.float() - mean[:, :, None]).abs().amax(2) + 0.1).sqrt())
    append(k, v, cache, length, start=start, slots=slots)
    if case.start and not case.ring:
        forget_padding(cache, case.start)
    sinks = torch.linspace(-1, 3, case.heads * case.group, device=device) if case.sinks else None
    return Call(q, cache, length, start, table, sinks, case)


def check(decode: Callable[..., tuple[Tensor, Tensor]], call: Call) -> None:
    """Every element within its bound of the float64 definition on the same codes, and the log-sum-exp close."""
    out, lse = call.run(decode)
    attributes = Attributes(call.cache.head_dim**-0.5, call.case.window or -1, call.case.softcap)
    dense = call.cache if call.table is None else reference.gathered(call.cache, call.table)
    exact, exact_lse, weights = reference.attend(call.q, dense, call.length, call.start, attributes, call.sinks)
    bound = decode_bound(exact, weights, call.q, dense, call.length, call.start, attributes.scale, out.dtype)
    assert bool(torch.isfinite(out).all())
    assert bool(((out.double() - exact).abs() <= bound).all()), f"{((out.double() - exact).abs() / bound).max()}"
    nothing = torch.isinf(exact_lse)
    assert torch.equal(nothing, torch.isinf(lse))
    assert bool((torch.where(nothing, 0.0, lse.double() - exact_lse).abs() <= 0.01).all())


def same_bytes(cache: PackedKV, other: PackedKV) -> None:
    for name in TENSORS:
        ours, theirs = getattr(cache, name), getattr(other, name)
        if ours is not None:
            equal = torch.equal(ours.contiguous().view(torch.uint8).cpu(), theirs.contiguous().view(torch.uint8).cpu())
            assert equal, name


def copy_of(cache: PackedKV, device: str) -> PackedKV:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(device, copy=True)

    names = (*TENSORS, "k_mean", "k_channel")
    return replace(cache, **{name: moved(getattr(cache, name)) for name in names})


CASES = [
    *(Case(name, (300, 1, 0)) for name in FORMATS),
    Case("int4", (70, 33), group=2, d=80, sq=3),
    Case("int8", (70, 33), heads=1, group=7, d=96, start=(3, 0)),
    Case("int4", (200, 150), group=1, d=128, page=16),
    Case("fp8", (200, 150), group=2, d=128, page=64, sq=2, channels=False),
    Case("int4", (200, 150), first=4, newest=32, start=(0, 7)),
    Case("int8", (200, 20), first=4, newest=32, sq=2),
    Case("int4", (200, 20), ring=True, capacity=48, window=48),
    Case("int8", (200, 20), window=50, sq=2, softcap=20.0, sinks=True, start=(160, 0)),
    Case("k8v4", (100,), heads=1, group=8, d=128, sq=5, sinks=True),
    Case("fp8", (90, 70), heads=1, group=2, d=128, start=(37, 0), first=3, channels=False),
]
ON_A_GPU = [
    *(Case(name, (5000, 3001), d=128) for name in FORMATS),
    Case("fp8", (2000,), heads=1, group=16, d=256),
    Case("int4", (2000, 5), group=8, d=192, sq=4),
    Case("int8", (9000,), group=1, d=256),
    Case("int4", (9000, 0), group=4, d=256, sq=3),
    Case("fp8", (700, 300), group=16, d=128, start=(100, 13)),
    Case("int4", (3000, 68, 3), d=128, first=4, newest=64, start=(5, 0, 0)),
    Case("fp8", (300, 2), group=8, d=128, first=4, newest=200, sq=2, softcap=20.0, sinks=True),
    Case("k8v4", (3000, 10), heads=1, d=256, first=9, newest=70, window=1000),
    Case("int4", (200, 20), d=128, first=4, newest=20, ring=True, capacity=48, window=48),
    *(Case(name, tuple(range(3, 125, 2)), d=128) for name in ("fp8", "int4")),  # as many heads as multiprocessors
    Case("int4", (4500, 3, 0, 4097, 700, 4352), heads=16, d=128),  # almost as many, and long
    Case("int4", (4352, 70, 4500, 1, 300, 64), heads=16, first=4, newest=64),
    *(Case(name, (131072,), heads=1, group=8, d=128, even=True) for name in ("fp8", "int8", "int4")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_cpu(case: Case):
    check(attention_decode, build(kv_append, case, torch.float32, "cpu"))


@pytest.mark.parametrize("name", FORMATS)
def test_error_against_the_rows_themselves(name: str):
    """The definition itself is attention: against torch's, off by no more than the format's rounding."""
    case = Case(name, (90, 90), sq=2, first=2, newest=5)
    call = build(kv_append, case, torch.float32, "cpu")
    q, k, v = rows(case, torch.float32, "cpu")
    seen = torch.arange(90) <= 88 + torch.arange(2)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    worst = {"fp8": 0.1, "int8": 0.03, "int4": 0.5, "k8v4": 0.2, "16bit": 1e-5}[name]
    assert float((call.run(attention_decode)[0].transpose(1, 2) - expected).abs().max()) < worst


@pytest.mark.parametrize("code", ["e4m3", "int8", "int4"])
def test_rows_round_to_the_nearest_code(code):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-4, 3, 50)[:, None]
    x[7], x[8] = 0.0, 3.0
    codes, scale = quantize_rows(x, code, torch.float32)
    error = (dequantize_rows(codes, scale) - x.double()).abs()
    if code == "int4":
        assert float((error / (x.amax(1) - x.amin(1) + 1e-6).double()[:, None]).max()) < 0.5 / 15 + 0.005
    else:
        step = 2.0**-4 if code == "e4m3" else 0.5 / 127
        assert bool((error <= step * 1.001 * x.abs().amax(1).double()[:, None]).all())
    assert float(error[7].max()) == 0.0


def test_tokens_appended_singly_are_those_appended_at_once():
    case = Case("int4", (40, 31), first=2, newest=6, capacity=48)
    whole = build(kv_append, case, torch.float32, "cpu")
    _, k, v = rows(case, torch.float32, "cpu")
    cache = copy_of(whole.cache, "cpu")
    poison(cache)
    for i in range(40):
        kv_append(k[:, :, i : i + 1], v[:, :, i : i + 1], cache, whole.length - 39 + i)
    call = replace(whole, cache=cache)
    assert torch.equal(call.run(attention_decode)[0], whole.run(attention_decode)[0])


def test_what_has_no_slot_is_not_written():
    cache = PackedKV.empty("int8", 2, 1, 8, 16)
    before = copy_of(cache, "cpu")
    x = torch.randn(2, 1, 3, 16)
    kv_append(x, x, cache, torch.tensor([12, 0], dtype=torch.int32))
    kv_append(x, x, cache, torch.tensor([3, 3], dtype=torch.int32), slots=torch.full((2, 3), -1))
    same_bytes(cache, before)


def test_refusals():
    cache = PackedKV.empty("int8", 2, 2, 8, 16)
    length = torch.tensor([3, 3], dtype=torch.int32)
    q = torch.randn(2, 4, 1, 16)
    with pytest.raises(RuntimeError, match=r"length is torch.int64 \(2,\), needs int32 \[2\]"):
        attention_decode(q, cache, length.long())
    with pytest.raises(RuntimeError, match="window = 0, needs at least 1 token"):
        attention_decode(q, cache, length, window=0)
    with pytest.raises(RuntimeError, match="Hq a multiple of the cache's heads"):
        attention_decode(q[:, :3], cache, length)
    with pytest.raises(RuntimeError, match="a paged cache needs slots"):
        kv_append(q[:1, :2], q[:1, :2], cache, length[:1])
    with pytest.raises(ValueError, match="no KV format 'int3'; there are fp8, int8, int4"):
        PackedKV.empty("int3", 1, 1, 1, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head_dim = 15 is odd"):
        PackedKV.empty("int4", 1, 1, 1, 15)


def test_memory_is_what_the_format_says():
    sizes = {name: PackedKV.empty(name, 1, 8, 64, 128).bytes_per_token for name in FORMATS}  # type: ignore[arg-type]
    assert sizes == {"fp8": 2112, "int8": 2112, "int4": 1088, "k8v4": 1600, "16bit": 4096}


def test_traces_whole():
    case = Case("int4", (20, 9), capacity=32)
    call = build(kv_append, case, torch.float32, "cpu")
    _, k, v = rows(case, torch.float32, "cpu")

    def step(q, k, v):
        kv_append(k, v, call.cache, call.length + 1)
        return attention_decode(q, call.cache, call.length + 1)[0]

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(call.q, k[:, :, :1], v[:, :, :1])
    assert torch.equal(out, attention_decode(call.q, call.cache, call.length + 1)[0])


def test_splits_fill_the_gpu():
    assert splits(512, 4096, 264) == 1
    assert splits(128, 32768, 264) == 2
    assert splits(8, 100, 264) == 1
    assert 28 <= splits(8, 131072, 264) <= 33


def test_few_short_sequences_are_shared_by_clusters():
    clusters = [shares(8, tokens, 2, 132, 128) for tokens in (100, 256, 1024, 4096)]
    assert clusters == [(1, False), (2, True), (8, True), (8, True)]
    assert [shares(pairs, 1024, 2, 132, 128) for pairs in (16, 32, 64)] == [(4, True), (2, True), (4, False)]


def test_shares_are_whole_tiles_of_a_full_wave():
    assert [shares(8, tokens, 2, 132, tile) for tokens, tile in ((32768, 128), (32768, 256), (131072, 128))] == [
        (32, False)
    ] * 3  # 33 would fill the last eight places, and leave warps of others a tile to wait for
    assert [shares(pairs, tokens, 2, 132, 128)[0] for pairs, tokens in ((512, 4096), (1024, 8192), (128, 32768))] == [
        1, 1, 2
    ]  # fmt: skip


def test_sequences_are_divided_only_where_that_pays():
    """Writing, reading and adding parts has a price, and so has every wave: measured on an H200."""
    assert [shares(192, 2048, 2, 132, tile)[0] for tile in (128, 256)] == [1, 1]  # 4 take 24 to 33 % more
    assert [shares(560, 1000, 2, 132, tile)[0] for tile in (128, 256)] == [1, 1]  # 2 take 20 to 34 % more
    assert shares(40, 12000, 2, 132, 128)[0] == 6  # 19 take 15 % more
    few = [shares(pairs, tokens, 2, 132, 128)[0] for pairs, tokens in ((72, 3000), (48, 2048), (24, 5000))]
    assert few == [3, 5, 11]


def test_almost_as_many_heads_as_processors_get_a_cta_each():
    sm90 = importlib.import_module("quantlab_kernels.attention_decode.sm90")

    def warps(format: str, batch: int, tokens: int) -> int:
        return sm90.config(Problem(batch, 32, 8, 1, 128, tokens, *FORMATS[format]), 132).warps

    assert [warps("fp8", batch, 1024) for batch in (11, 12, 16, 17)] == [8, 12, 12, 8]
    assert [warps("int4", 12, tokens) for tokens in (4096, 4352, 12288, 16384)] == [12, 16, 16, 8]
    assert [warps("int4", batch, 32768) for batch in (13, 14, 16)] == [8, 16, 16]
    assert warps("k8v4", 12, 32768) == 12


def problem(format: str, d: int = 128, **more) -> Problem:
    return Problem(1, 8, 2, 1, d, 1024, *FORMATS[format], **more)


@pytest.mark.parametrize(
    ("asked", "chosen", "reason"),
    [
        (problem("int4"), "sm90", None),
        (problem("int4", near=68), "sm90", None),
        (problem("int8", page=16), "sm90", None),
        (problem("k8v4", 256, page=48, ring=True, window=48), "sm90", None),
        (problem("fp8"), "sm90", None),
        (problem("int4", 80), "triton", "head dim 80, needs 64, 128 or 256"),
        (problem("int8", page=24), "triton", "pages and rings need a multiple of 16 slots"),
        (problem("16bit"), "triton", "reads codes of 8 and 4 bits only"),
        (problem("int4", sm=80), "triton", "compiled for sm_90 only, the GPU is sm_80"),
        (problem("int8", 512), "eager", "head dim 512, needs 64, 128 or 256"),
    ],
    ids=str,
)
def test_who_runs_what(asked: Problem, chosen: str, reason: str | None, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("quantlab_kernels.common.nvrtc.library", lambda: None)
    verdicts = importlib.import_module("quantlab_kernels.attention_decode.op").BACKENDS.explain(asked)
    assert [v.backend for v in verdicts if v.chosen] == [chosen]
    assert verdicts[0].reason is None if reason is None else str(verdicts[0].reason).startswith(reason)


@pytest.mark.parametrize(("d", "chosen"), [(128, "triton"), (80, "triton"), (81, "eager")])
def test_who_appends_what(d: int, chosen: str):
    pytest.importorskip("triton")
    op = importlib.import_module("quantlab_kernels.kv_append.op")
    verdicts = op.BACKENDS.explain(op.Problem(1, 2, 1, d, "int8", "int8"))
    assert [v.backend for v in verdicts if v.chosen] == [chosen]
    assert verdicts[0].reason == ("heads of 81 channels, needs an even number" if d == 81 else None)


INTERPRETED = """
import importlib, types, torch
from test_attention_decode import Attributes, Case, build, check, copy_of, same_bytes
from quantlab_kernels import kv_append
append = importlib.import_module("quantlab_kernels.kv_append.op")
decode = importlib.import_module("quantlab_kernels.attention_decode.op")
from quantlab_kernels.kv_append import triton as appending
from quantlab_kernels.attention_decode import triton as attending
attending.gpu_of = lambda tensor: types.SimpleNamespace(sm_count=2)
def appended(k, v, cache, length, *, start, slots):
    expected = copy_of(cache, "cpu")
    kv_append(k, v, expected, length, start=start, slots=slots)
    problem = append.Problem(*k.shape, append.code_of(cache.k), append.code_of(cache.v), k.dtype, 80)
    appending.launch(
        problem, k, v, cache.k, cache.k_scale, cache.v, cache.v_scale, cache.k_near, cache.v_near, cache.k_mean,
        cache.k_channel, length, start, slots, cache.first, cache.ring,
    )
    same_bytes(cache, expected)
def attended(q, cache, length, *, start, block_table, window, softcap, sinks):
    out, lse = decode._empty(q)
    slots = cache.capacity * (1 if block_table is None else block_table.shape[1])
    problem = decode._problem(q, cache, block_table, window or -1, softcap, slots, 80)
    attributes = Attributes(cache.head_dim**-0.5, window or -1, softcap)
    attending.launch(problem, q, cache, length, start, block_table, attributes, sinks, out, lse)
    return out, lse
for case in {cases}:
    check(attended, build(appended, case, torch.float16, "cpu"))
"""
SMALL = [
    Case("int4", (40, 21), heads=1, first=2, newest=9, start=(0, 3)),
    Case("fp8", (40, 0), heads=1, group=2, d=32, page=16, sq=2, softcap=20.0, sinks=True),
    Case("int8", (60,), heads=1, group=1, d=48, ring=True, capacity=24, window=24),
]


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED.format(cases=SMALL))


def appended_twice(k, v, cache, length, *, start=None, slots=None):
    """On the GPU and on the CPU: both write the same bytes."""
    expected = copy_of(cache, "cpu")
    on_cpu = [None if t is None else t.cpu() for t in (start, slots)]
    kv_append(k.cpu(), v.cpu(), expected, length.cpu(), start=on_cpu[0], slots=on_cpu[1])
    kv_append(k, v, cache, length, start=start, slots=slots)
    same_bytes(cache, expected)


HOPPER = [c for c in [*CASES, *ON_A_GPU] if c.d in (64, 128, 256) and c.format != "16bit"]


@pytest.fixture(scope="module")
def compiled() -> None:
    """All Hopper kernels of this file, compiled at the same time."""
    sm90 = importlib.import_module("quantlab_kernels.attention_decode.sm90")
    problems = [
        Problem(
            1, c.heads * c.group, c.heads, c.sq, c.d, 256, *FORMATS[c.format], dtype,
            c.capacity if c.ring else c.page, c.first + c.newest, -1, c.ring, c.softcap > 0, 90,
        )
        for c in HOPPER
        for dtype in (torch.bfloat16, torch.float16)
    ]  # fmt: skip
    sm90.warmup(problems)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("case", [*CASES[5:], *ON_A_GPU[:5], ON_A_GPU[-1]], ids=str)
def test_triton_on_the_gpu(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_ATTENTION_DECODE_BACKEND", "triton")
    check_twice(build(appended_twice, case, torch.bfloat16, "cuda"))


@pytest.mark.gpu(sm=90)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_hopper_on_the_gpu(case: Case, dtype: torch.dtype, compiled: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_ATTENTION_DECODE_BACKEND", "sm90")
    check_twice(build(kv_append, case, dtype, "cuda"))


def check_twice(call: Call) -> None:
    check(attention_decode, call)
    first, second = call.run(attention_decode), call.run(attention_decode)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("name", FORMATS)
def test_lengths_change_inside_a_graph(name: str):
    case = Case(name, (600, 512), d=128)
    call = build(kv_append, case, torch.bfloat16, "cuda")
    attention_decode(call.q, call.cache, call.length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_decode(call.q, call.cache, call.length)
    for lengths in ([600, 512], [1, 300], [0, 17]):
        call.length.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, attention_decode(call.q, call.cache, call.length)[0])


def test_positions_of_a_ring():
    cache = PackedKV.empty("int8", 1, 1, 4, 16, ring=True)
    position, _ = reference.positions(cache, torch.tensor([7]), torch.tensor([0]))
    assert position.tolist() == [[4, 5, 6, 3]]
