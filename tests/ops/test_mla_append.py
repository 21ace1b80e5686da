"""Appending latents: norm, rotation of the position part, quantization and places, against plain torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantlab_kernels import PackedLatent, mla_append, mla_step, mla_turn
from quantlab_kernels.common.latent import FORMATS, dequantize_latent
from quantlab_kernels.mla_append.reference import turned_pairs

STEP = {"fp8": 2.0**-4, "int8": 0.5 / 127, "int4": 0.45, "16bit": 2.0**-8}  # of a row's largest magnitude


def inputs(batch: int, tokens: int, rank: int, rope: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch, tokens, rank + rope, generator=generator) * 3
    angles = torch.randn(1, tokens, rope // 2, generator=generator).repeat(1, 1, 2)
    given = {
        "rows": rows,
        "norm": torch.rand(rank, generator=generator) + 0.5,
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    return {name: x.to(device, dtype) for name, x in given.items()}


def expected(given: dict[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Latents and position parts in float64, as DeepSeek-V3's attention makes them."""
    rows, norm, cos, sin = (given[name].double() for name in ("rows", "norm", "cos", "sin"))
    latent, rope = rows[..., :rank], rows[..., rank:]
    latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
    pairs = rope.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    one, two = pairs.chunk(2, -1)
    return latent, pairs * cos + torch.cat((-two, one), -1) * sin


def check(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", rank: int = 64, rope: int = 16) -> None:
    batch, tokens = 2, 9
    given = inputs(batch, tokens, rank, rope, dtype, device)
    cache = PackedLatent.empty(name, batch, 16, rank, rope, dtype=dtype, device=device)  # type: ignore[arg-type]
    length = torch.tensor([12, 6], dtype=torch.int32, device=device)
    latent, part = given["rows"].split([rank, rope], -1)
    turn = {"cos": given["cos"], "sin": given["sin"], "interleaved": True}
    mla_append(latent, part, cache, length, norm=given["norm"], **turn)
    wanted, turned = expected(given, rank)
    found = dequantize_latent(cache.latent, cache.scale)
    for i, end in enumerate((12, 6)):
        kept = min(end, tokens)
        new, old = found[i, end - kept : end], wanted[i, tokens - kept :]
        assert bool(((new - old).abs() <= STEP[name] * 1.01 * old.abs().amax(-1, keepdim=True)).all())
        off = (cache.rope[i, end - kept : end].double() - turned[i, tokens - kept :]).abs()
        assert float(off.max()) <= (2.0**-20 if dtype == torch.float32 else 2.0**-7) * float(turned.abs().max())
        assert not cache.latent.view(torch.uint8)[i, end:].any()


@pytest.mark.parametrize("name", FORMATS)
def test_norm_rotation_and_codes(name: str):
    check(name)


def check_pages(rank: int, rope: int, dtype: torch.dtype, device: str) -> None:
    """Without norm and angles rows are quantized as they are, into the slots that are named."""
    x = torch.randn(1, 3, rank + rope, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    dense = PackedLatent.empty("int4", 1, 3, rank, rope, dtype=dtype, device=device)
    pool = PackedLatent.empty("int4", 4, 2, rank, rope, dtype=dtype, device=device)
    length = torch.tensor([3], dtype=torch.int32, device=device)
    mla_append(x[..., :rank], x[..., rank:], dense, length)
    mla_append(x[..., :rank], x[..., rank:], pool, length, slots=torch.tensor([[5, -1, 2]], device=device))
    for page, place, token in ((2, 1, 0), (1, 0, 2)):
        assert torch.equal(pool.latent[page, place], dense.latent[0, token])
        assert torch.equal(pool.rope[page, place], x[0, token, rank:])
        if pool.scale is not None and dense.scale is not None:
            assert pool.scale[page, place] == dense.scale[0, token]
    assert int(pool.latent.any(-1).sum()) == 2


def test_pages_and_rows_that_are_ready():
    check_pages(64, 16, torch.float32, "cpu")


@pytest.mark.gpu(sm=80)
def test_pages_on_the_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_MLA_APPEND_BACKEND", "triton")
    check_pages(512, 64, torch.bfloat16, "cuda")


LAYOUTS = [(False, False), (True, False), (True, True)]  # pairs side by side: in the projection, in the cache


def check_step(
    name: str, layout: tuple[bool, bool], dtype: torch.dtype = torch.float32, device: str = "cpu", rank: int = 64,
    rope: int = 16, heads: int = 5,
) -> None:  # fmt: skip
    """The cache of a step is that of `mla_append`; queries are turned as the key is; a full cache is left alone."""
    given = inputs(3, 1, rank, rope, dtype, device)
    latent, part = given["rows"].split([rank, rope], -1)
    caches = [PackedLatent.empty(name, 3, 16, rank, rope, dtype=dtype, device=device) for _ in range(2)]  # type: ignore[arg-type]
    length = torch.tensor([12, 0, 16], dtype=torch.int32, device=device)
    interleaved, kept = layout
    angles = {"cos": given["cos"], "sin": given["sin"], "interleaved": interleaved}
    mla_append(latent, part, caches[0], length + 1, norm=given["norm"], **angles)
    halves = {key: given[key].unflatten(-1, (2, -1)).movedim(-2, -1)[..., 0] for key in ("cos", "sin")}  # with gaps
    queries = torch.randn(3, 1, heads, rope + 3, generator=torch.Generator().manual_seed(1)).to(device, dtype)[..., 3:]
    queries[:, :, 0] = part
    out = mla_step(
        queries, latent, part, caches[1], length, norm=given["norm"], interleaved=interleaved, kept_interleaved=kept,
        **halves,
    )  # fmt: skip
    assert length.tolist() == [13, 1, 17]
    assert torch.equal(caches[0].latent.view(torch.uint8), caches[1].latent.view(torch.uint8))
    if caches[0].scale is not None and caches[1].scale is not None:
        assert torch.equal(caches[0].scale, caches[1].scale)
    apart = caches[1].rope.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if kept else caches[1].rope
    assert torch.equal(caches[0].rope, apart)
    for row, slot in ((0, 12), (1, 0)):
        assert torch.equal(out[row, 0, 0], caches[1].rope[row, slot])
    pairs = queries.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    turned = out.unflatten(-1, (-1, 2) if kept else (2, -1))
    sizes = [x.double().square().sum(-1 if side else -2) for x, side in ((pairs, interleaved), (turned, kept))]
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-5 if dtype == torch.float32 else 0.03, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["fp8", "int4", "16bit"])
def test_a_step_appends_and_turns(name: str, layout: tuple[bool, bool]):
    check_step(name, layout)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("heads", [1, 16, 40])
def test_a_step_on_the_gpu(name: str, layout: tuple[bool, bool], heads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_MLA_APPEND_BACKEND", "triton")
    check_step(name, layout, torch.bfloat16, "cuda", 512, 64, heads)


def check_turn(
    layout: tuple[bool, bool], dtype: torch.dtype = torch.float32, device: str = "cpu", rope: int = 16
) -> None:
    """Queries and keys in the columns of wider rows are turned as in a step; what stands beside them stays."""
    heads, given = 5, inputs(2, 9, 8, rope, dtype, device)
    rows = torch.randn(2, 9, heads + 1, rope + 8, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    before = rows.clone()
    cos, sin = (given[key][..., : rope // 2] for key in ("cos", "sin"))
    mla_turn(rows[:, :, 1:, 8:], rows[:, :, 0, 8:], cos, sin, interleaved=layout[0], kept_interleaved=layout[1])
    wanted = turned_pairs(before[..., 8:].double().cpu(), cos[:, :, None].cpu(), sin[:, :, None].cpu(), *layout)
    torch.testing.assert_close(
        rows[..., 8:].float().cpu(), wanted, atol=0.02 if dtype != torch.float32 else 1e-6, rtol=0
    )
    assert torch.equal(rows[..., :8], before[..., :8])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_and_keys_are_turned_in_place(layout: tuple[bool, bool]):
    check_turn(layout)
    with pytest.raises(RuntimeError, match="needs floats of one dtype"):
        mla_turn(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    with pytest.raises(RuntimeError, match="mla_turn: cos"):
        mla_turn(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 8), torch.ones(1, 2, 8), torch.ones(1, 2, 4))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_turning_in_place_on_the_gpu(layout: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_MLA_APPEND_BACKEND", "triton")
    check_turn(layout, torch.bfloat16, "cuda", 64)


def test_steps_that_do_not_fit():
    cache = PackedLatent.empty("fp8", 2, 8, 64, 16)
    x, r, q = torch.randn(2, 1, 64), torch.randn(2, 1, 16), torch.randn(2, 1, 4, 16)
    length, angle = torch.tensor([3, 3], dtype=torch.int32), torch.ones(1, 1, 8)
    with pytest.raises(RuntimeError, match=r"needs one token, torch\.float32"):
        mla_step(q[:1], x, r, cache, length, cos=angle, sin=angle)
    with pytest.raises(RuntimeError, match=r"sin \(1, 1, 16\); need floats \[2 or 1, 1, 8\]"):
        mla_step(q, x, r, cache, length, cos=angle, sin=torch.ones(1, 1, 16))


def test_refusals():
    cache = PackedLatent.empty("fp8", 2, 8, 64, 16)
    x, r = torch.randn(2, 3, 64), torch.randn(2, 3, 16)
    length = torch.tensor([3, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="needs floats of one dtype"):
        mla_append(x, r.half(), cache, length)
    with pytest.raises(RuntimeError, match="cos and sin come together"):
        mla_append(x, r, cache, length, cos=torch.ones(1, 3, 16))
    with pytest.raises(RuntimeError, match="norm needs 64 floats"):
        mla_append(x, r, cache, length, norm=torch.ones(16))
    with pytest.raises(RuntimeError, match="a paged cache needs slots"):
        mla_append(x[:1], r[:1], cache, length[:1])
    with pytest.raises(RuntimeError, match="scale is None, needs"):
        mla_append(x, r, replace(cache, scale=None), length)


def test_sizes_without_a_kernel_have_a_reason():
    op = importlib.import_module("quantlab_kernels.mla_append.op")
    backend = importlib.import_module("quantlab_kernels.mla_append.triton")
    problem = op.Problem(16, 1, 512, 64, "e4m3")
    for able in ({}, {"dtype": torch.float32}, {"rank": 256, "rope": 32}, {"sm": 80}):
        assert backend.supports(replace(problem, **able)) is None
    assert "needs powers of two" in str(backend.supports(replace(problem, rank=96)))
    assert "needs sm_80" in str(backend.supports(replace(problem, sm=75)))


INTERPRETED = """
import importlib, torch
import test_mla_append
op = importlib.import_module("quantlab_kernels.mla_append.op")
from quantlab_kernels.mla_append import triton as backend
def appended(latent, rope, cache, length, *, norm, cos, sin, interleaved):
    problem = op.Problem(*latent.shape, rope.shape[2], op.code_of(cache.latent), latent.dtype, 80)
    backend.launch(
        problem, latent, rope, cache.latent, cache.rope, cache.scale, length, norm, cos, sin, None, 1e-6, interleaved
    )
def step(query, latent, rope, cache, length, *, cos, sin, norm, interleaved, kept_interleaved):
    problem = op.Problem(
        *latent.shape, rope.shape[2], op.code_of(cache.latent), latent.dtype, 80, heads=query.shape[2]
    )
    out = torch.empty(query.shape, dtype=query.dtype)
    backend.launch_step(
        problem, query, latent, rope, cache.latent, cache.rope, cache.scale, length, norm, cos, sin, 1e-6, interleaved,
        kept_interleaved, out,
    )
    return out
def turn(query, rope, cos, sin, *, interleaved, kept_interleaved):
    batch, tokens, heads, turning = query.shape
    problem = op.Problem(batch, tokens, 16, turning, "float", query.dtype, 80, True, heads)
    backend.launch_turn(problem, query, rope, cos, sin, interleaved, kept_interleaved)
test_mla_append.mla_append, test_mla_append.mla_step, test_mla_append.mla_turn = appended, step, turn
for layout in test_mla_append.LAYOUTS:
    test_mla_append.check_turn(layout, torch.float16)
for layout in test_mla_append.LAYOUTS:
    test_mla_append.check_step("fp8", layout, torch.float16, heads=20)
for name in ("fp8", "int8", "int4", "16bit"):
    test_mla_append.check(name, torch.float16)
"""


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (256, 32), (128, 64), (64, 16), (1024, 128)])
def test_on_the_gpu(name: str, dtype: torch.dtype, rank: int, rope: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_MLA_APPEND_BACKEND", "triton")
    check(name, dtype, "cuda", rank, rope)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("name", FORMATS)
def test_a_graph_appends_where_the_length_says(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_MLA_APPEND_BACKEND", "triton")
    cache = PackedLatent.empty(name, 1, 64, 512, 64, device="cuda")  # type: ignore[arg-type]
    x = torch.randn(1, 1, 576, device="cuda", dtype=torch.bfloat16)
    length = torch.tensor([1], dtype=torch.int32, device="cuda")
    mla_append(x[..., :512], x[..., 512:], cache, length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_append(x[..., :512], x[..., 512:], cache, length)
    length.fill_(40)
    graph.replay()
    assert torch.equal(cache.rope[0, 39], x[0, 0, 512:])
    assert torch.equal(cache.latent.view(torch.uint8)[0, 39], cache.latent.view(torch.uint8)[0, 0])
    assert not cache.rope[0, 1:39].any()
