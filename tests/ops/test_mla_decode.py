"""Absorbed attention over packed latents, element by element; caches are filled with NaN before tokens are written."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from quantlab_kernels import PackedLatent, mla_decode
from quantlab_kernels.common.latent import FORMATS, dequantize_latent, from_exchange, quantize_latent, to_exchange
from quantlab_kernels.mla_decode import bench, reference
from quantlab_kernels.mla_decode.bounds import decode_bound

SCALE = 0.09


@dataclass(frozen=True)
class Case:
    """One call. even: near-uniform attention over latents far from 0, where errors of a sum do not cancel."""

    format: str
    lengths: tuple[int, ...]
    heads: int = 5
    sq: int = 1
    rank: int = 64
    rope: int = 16
    page: int = 0
    start: tuple[int, ...] | None = None
    even: bool = False


@dataclass
class Call:
    q_latent: Tensor
    q_rope: Tensor
    cache: PackedLatent
    length: Tensor
    start: Tensor | None
    table: Tensor | None
    case: Case = field(repr=False)

    def run(self, decode: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return decode(
            self.q_latent, self.q_rope, self.cache, self.length, scale=SCALE, start=self.start, block_table=self.table
        )


def poison(cache: PackedLatent) -> None:
    """NaN wherever a format has it."""
    for tensor in (cache.latent, cache.rope, cache.scale):
        if tensor is None:
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 85)


def rows(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q_latent, q_rope, latents [B, S, L] and position parts [B, S, R], float32, tokens of very different magnitude."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = len(case.lengths), max(*case.lengths, 1)
    latent = torch.randn(batch, tokens, case.rank, generator=generator)
    latent = latent * 0.2 + 1.0 if case.even else latent * torch.logspace(-2, 0.5, tokens)[:, None]
    rope = torch.randn(batch, tokens, case.rope, generator=generator)
    rope[..., 1] *= 10
    shape = batch, case.sq, case.heads
    q_latent = torch.randn(*shape, case.rank, generator=generator)
    q_rope = torch.randn(*shape, case.rope, generator=generator)
    factor = 0.05 if case.even else 64**0.5 / case.rank**0.5
    return q_latent * factor, q_rope * factor, latent, rope


def build(case: Case, dtype: torch.dtype, device: str) -> Call:
    """A poisoned cache in which the case's tokens have been written, dense or in shuffled pages."""
    q_latent, q_rope, latent, rope = (x.to(dtype) for x in rows(case))
    batch, tokens = latent.shape[:2]
    slots = tokens + 3
    cache = PackedLatent.empty(case.format, batch, slots, case.rank, case.rope, dtype=dtype)  # type: ignore[arg-type]
    poison(cache)
    codes, scale = quantize_latent(latent.float(), FORMATS[case.format], dtype)
    for i, length in enumerate(case.lengths):
        begin = 0 if case.start is None else case.start[i]
        bytes_of(cache.latent)[i, begin:length] = bytes_of(codes)[i, begin:length]
        cache.rope[i, begin:length] = rope[i, begin:length]
        if scale is not None and cache.scale is not None:
            cache.scale[i, begin:length] = scale[i, begin:length]
    table = None
    if case.page:
        cache, table = paged(cache, case.page)
        table = table.to(device)
    cache = moved(cache, device)
    length = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    start = None if case.start is None else torch.tensor(case.start, dtype=torch.int32, device=device)
    return Call(q_latent.to(device), q_rope.to(device), cache, length, start, table, case)


def bytes_of(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def moved(cache: PackedLatent, device: str) -> PackedLatent:
    scale = None if cache.scale is None else cache.scale.to(device)
    return replace(cache, latent=cache.latent.to(device), rope=cache.rope.to(device), scale=scale)


def paged(cache: PackedLatent, page: int) -> tuple[PackedLatent, Tensor]:
    """The same tokens in pages of a shuffled pool; entries of the table that no token needs are out of any range."""
    batch, slots = cache.latent.shape[:2]
    count = -(-slots // page)
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(1)).reshape(batch, count)
    rank, rope = cache.rank, cache.rope.shape[2]
    pool = PackedLatent.empty(cache.format, batch * count + 1, page, rank, rope, dtype=cache.rope.dtype)
    poison(pool)
    for i in range(batch):
        for j in range(count):
            part = slice(j * page, min((j + 1) * page, slots))
            into = int(order[i, j]), slice(0, part.stop - part.start)
            bytes_of(pool.latent)[into] = bytes_of(cache.latent)[i, part]
            pool.rope[into] = cache.rope[i, part]
            if pool.scale is not None and cache.scale is not None:
                pool.scale[into] = cache.scale[i, part]
    junk = torch.full((batch, 1), 2147480000)
    return pool, torch.cat((order, junk), 1).to(torch.int32)


def check(
    decode: Callable[..., tuple[Tensor, Tensor]], call: Call, narrow: bool = False, narrow_weights: bool | None = None
) -> None:
    """Every element within its bound of the float64 definition on the same codes, and the log-sum-exp close."""
    out, lse = call.run(decode)
    dense = call.cache if call.table is None else reference.gathered(call.cache, call.table)
    given = call.q_latent, call.q_rope, dense, call.length, call.start, SCALE
    exact, exact_lse, weights = reference.attend(*given)
    rounded = narrow if narrow_weights is None else narrow_weights
    bound = decode_bound(exact, weights, *given, narrow=narrow, narrow_weights=rounded)
    assert bool(torch.isfinite(out).all())
    assert bool(((out.double() - exact).abs() <= bound).all()), f"{((out.double() - exact).abs() / bound).max()}"
    nothing = torch.isinf(exact_lse)
    assert torch.equal(nothing, torch.isinf(lse))
    most = 0.06 if rounded else 0.02 if narrow else 0.01
    assert bool((torch.where(nothing, 0.0, lse.double() - exact_lse).abs() <= most).all())
    if narrow:  # no more than what E4M3 latents lose themselves
        assert float((out.double() - exact).norm()) <= 0.025 * float(exact.norm())


CASES = [
    *(Case(name, (150, 1, 0)) for name in FORMATS),
    Case("int4", (70, 33), heads=1, sq=3, rank=128),
    Case("fp8", (100, 60), sq=2, page=16, start=(0, 7)),
    Case("16bit", (90,), heads=16, page=64, sq=4),
    Case("int8", (300,), heads=3, even=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_cpu(case: Case):
    check(mla_decode, build(case, torch.float32, "cpu"))


@pytest.mark.parametrize("name", FORMATS)
def test_error_against_the_rows_themselves(name: str):
    """The definition itself is attention: against torch's, off by no more than the format's rounding."""
    case = Case(name, (90, 90), sq=2)
    call = build(case, torch.float32, "cpu")
    q_latent, q_rope, latent, rope = rows(case)
    q = torch.cat((q_latent, q_rope), -1).transpose(1, 2)
    k = torch.cat((latent, rope), -1)[:, None].expand(-1, case.heads, -1, -1)
    v = latent[:, None].expand(-1, case.heads, -1, -1)
    seen = torch.arange(90) <= 88 + torch.arange(2)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE)
    worst = {"fp8": 0.05, "int8": 0.015, "int4": 0.25, "16bit": 1e-6}[name]
    assert float((call.run(mla_decode)[0].transpose(1, 2) - expected).norm() / expected.norm()) < worst


def relative_error(x: Tensor, name: str) -> float:
    back = dequantize_latent(*quantize_latent(x, FORMATS[name], torch.float32))
    return float((back - x).norm() / x.norm())


def test_errors_of_formats():
    """Gaussian rows; INT4 with one scale loses at most 1.1 times what a scale per 64 channels loses."""
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    assert relative_error(x, "fp8") < 0.03
    assert relative_error(x, "int8") < 0.009
    groups = x.unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    of_groups = float(((groups / scale).round() * scale - groups).norm() / x.norm())
    assert relative_error(x, "int4") < 1.1 * of_groups


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_rows_of_any_magnitude(name: str):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 6, 40)[:, None]
    x[7] = 0.0
    back = dequantize_latent(*quantize_latent(x, FORMATS[name], torch.float32))
    limit = {"fp8": 2.0**-4, "int8": 0.5 / 127, "int4": 0.4}[name]
    assert bool(((back - x).abs() <= limit * 1.001 * x.abs().amax(1, keepdim=True) + 1e-16).all())


def test_memory_is_what_the_format_says():
    sizes = {name: PackedLatent.empty(name, 1, 64, 512, 64).bytes_per_token for name in FORMATS}  # type: ignore[arg-type]
    assert sizes == {"fp8": 644, "int8": 644, "int4": 388, "16bit": 1152}


def test_exchange_layout():
    """656 bytes a token, there and back bit for bit; scales that differ are made one."""
    cache = PackedLatent.empty("fp8", 2, 5, 512, 64)
    latent = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(3))
    codes, scale = quantize_latent(latent, "e4m3", torch.float32)
    cache = replace(cache, latent=codes, scale=scale, rope=torch.randn(2, 5, 64).to(torch.bfloat16))
    rows = to_exchange(cache)
    assert rows.shape == (2, 5, 656)
    back = from_exchange(rows, 512)
    assert torch.equal(bytes_of(back.latent), bytes_of(cache.latent))
    assert torch.equal(back.rope, cache.rope)
    assert back.scale is not None
    assert torch.equal(back.scale, scale)
    tiles = rows[..., 512:528].contiguous().view(torch.float32)
    tiles[..., 1] *= 0.5
    rows[..., 512:528] = tiles.view(torch.uint8)
    halved = latent.clone()
    halved[..., 128:256] *= 0.5
    again = from_exchange(rows, 512)
    assert float((dequantize_latent(again.latent, again.scale) - halved).norm() / halved.norm()) < 0.03
    with pytest.raises(ValueError, match="the exchange layout is of fp8"):
        to_exchange(PackedLatent.empty("int4", 1, 1, 512, 64))


def test_what_no_gpu_has_verified_is_refused_but_can_be_forced():
    op = importlib.import_module("quantlab_kernels.mla_decode.op")
    backend = importlib.import_module("quantlab_kernels.mla_decode.triton")
    verified = op.Problem(16, 128, 1, 512, 64, 4096, "e4m3")
    assert backend.supports(verified) is None
    for other in ({"dtype": torch.float16}, {"sm": 80}):
        problem = replace(verified, **other)
        assert "QUANTLAB_MLA_DECODE_BACKEND=triton runs" in str(backend.supports(problem))
        assert backend.able(problem) is None
    hopper = importlib.import_module("quantlab_kernels.mla_decode.sm90")
    assert "compiled for sm_90 only" in hopper.supports(replace(verified, sm=100))
    assert "needs 256 or 512 and 64" in hopper.supports(replace(verified, rope=32))
    assert "pages of 20 tokens, needs multiples of 64" in hopper.supports(replace(verified, page=20))
    assert "needs bfloat16 or float16" in hopper.supports(replace(verified, kept=torch.float32))
    assert "needs bfloat16 or float16" in str(backend.able(replace(verified, kept=torch.float32)))
    many = importlib.import_module("quantlab_kernels.mla_decode.sm90_rows")
    assert many.supports(verified) == hopper.supports(verified)  # which asks for a compiler
    few = replace(verified, heads=16)
    assert many.supports(few) == (many.able(few) or "sm90 is quicker with 16 rows a tile")
    assert "int8 latents of 512 channels, needs floats, E4M3, or INT4 of 512" in str(
        many.able(replace(verified, code="int8"))
    )
    assert "needs 16 bits" in str(many.able(replace(verified, dtype=torch.float32)))
    assert "compiled for sm_90 only" in str(many.able(replace(verified, sm=100)))


def test_refusals():
    call = build(Case("fp8", (9, 9)), torch.float32, "cpu")
    q, r, cache, length = call.q_latent, call.q_rope, call.cache, call.length
    with pytest.raises(RuntimeError, match=r"length is torch.int64 \(2,\), needs int32 \[2\]"):
        mla_decode(q, r, cache, length.long(), scale=1.0)
    with pytest.raises(RuntimeError, match=r"latent is .* needs \[N, slots, 60\] in rows without gaps"):
        mla_decode(q[..., :60], r, cache, length, scale=1.0)
    with pytest.raises(RuntimeError, match=r"rope is torch.float32 \(2, 12, 16\), needs floats \(2, 12, 8\)"):
        mla_decode(q, r[..., :8], cache, length, scale=1.0)
    with pytest.raises(RuntimeError, match="scale is None, needs"):
        mla_decode(q, r, replace(cache, scale=None), length, scale=1.0)
    with pytest.raises(RuntimeError, match="a paged cache needs a block_table"):
        mla_decode(q[:1], r[:1], cache, length[:1], scale=1.0)
    with pytest.raises(RuntimeError, match="needs floats of one dtype"):
        mla_decode(q, r.half(), cache, length, scale=1.0)
    with pytest.raises(ValueError, match="no format 'k8v4' of latents; there are fp8, int8, int4, 16bit"):
        PackedLatent.empty("k8v4", 1, 1, 64, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="63 latent channels are odd"):
        PackedLatent.empty("int4", 1, 1, 63, 16)


def test_traces_whole():
    call = build(Case("int4", (20, 9)), torch.float32, "cpu")

    def step(q, r):
        return mla_decode(q, r, call.cache, call.length, scale=SCALE)[0]

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(call.q_latent, call.q_rope)
    assert torch.equal(out, step(call.q_latent, call.q_rope))


INTERPRETED = """
import importlib, types, torch
from test_mla_decode import Case, build, check
op = importlib.import_module("quantlab_kernels.mla_decode.op")
from quantlab_kernels.mla_decode import triton as backend
backend.gpu_of = lambda tensor: types.SimpleNamespace(sm_count={sms})
def attended(q_latent, q_rope, cache, length, *, scale, start, block_table):
    out, lse = op._empty(q_latent)
    slots = cache.capacity * (1 if block_table is None else block_table.shape[1])
    problem = op._problem(q_latent, cache, block_table, slots, 80)
    chosen = backend.Config(16, 32, 4, 1)
    backend.launch(problem, q_latent, q_rope, cache, length, start, block_table, scale, out, lse, chosen)
    return out, lse
for case in {cases}:
    check(attended, build(case, torch.float16, "cpu"))
"""
SMALL = [
    Case("int4", (70, 21, 0), heads=3, start=(0, 3, 0)),
    Case("fp8", (40, 0), heads=2, page=16, sq=2),
    Case("int8", (60,), heads=20),
    Case("16bit", (33, 5), heads=1, sq=3),
    Case("int8", (600,), heads=4),
]


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED.format(cases=SMALL, sms=2))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rank", [256, 512])
def test_hopper_configurations_fit(name: str, rank: int):
    """Whatever the number of heads, each team has room for a tile and warpgroups share columns in eights."""
    op = importlib.import_module("quantlab_kernels.mla_decode.op")
    backend = importlib.import_module("quantlab_kernels.mla_decode.sm90")
    chunks = rank * {"16bit": 16, "fp8": 8, "int8": 8, "int4": 4}[name] // 1024 + 1
    for heads in range(1, 200):
        chosen = backend.config(op.Problem(2, heads, 1, rank, 64, 4096, FORMATS[name]))
        assert chosen.ring(rank) >= chunks * chosen.teams
        assert chosen.rows % (8 * chosen.share) == 0
        assert (chunks - 1) % chosen.share == 0
        assert chosen.threads <= 1024


def test_parts_of_a_sequence():
    """Enough for all processors, in even shares of tiles, and no more than pay: measured on an H200."""
    op, division = (importlib.import_module(f"quantlab_kernels.mla_decode.{name}") for name in ("op", "division"))

    def parts(code: str, heads: int, batch: int, tokens: int, tile: int = 16) -> int:
        return division.parts(op.Problem(batch, heads, 1, 512, 64, tokens, code), tile, 132)

    assert [parts("float", 16, 16, tokens) for tokens in (100, 1024, 4096, 65536)] == [1, 4, 8, 8]
    assert [parts("float", 16, 1, tokens) for tokens in (64, 256, 4096, 65536)] == [1, 2, 32, 128]
    assert [parts("float", 16, batch, 4096) for batch in (64, 70, 128, 132, 500)] == [2, 5, 1, 1, 1]
    assert [parts(code, 128, 48, 3000, 64) for code in ("float", "e4m3", "int4")] == [1] * 3  # 4 take 8 to 11 % more
    assert [parts(code, 16, 96, 3000) for code in ("e4m3", "int4")] == [1] * 2  # 4 take 15 to 27 % more
    assert [parts(code, 64, 48, 3000, 64) for code in ("float", "e4m3", "int4")] == [2] * 3
    assert [parts(code, 128, 16, 4096, 64) for code in ("float", "e4m3", "int4")] == [4] * 3


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("rank", [256, 512])
def test_every_part_is_merged(width: int, rank: int):
    """By a CTA of no more threads than `merge.cuh` is compiled for, each of which takes 32 / `width` parts."""
    op, sm90 = (importlib.import_module(f"quantlab_kernels.mla_decode.{name}") for name in ("op", "sm90"))
    for count in range(2, 129):
        shape = sm90.merge_shape(op.Problem(3, 5, 2, rank, 64, 4096, "e4m3"), count, width)
        channels = 3 * 5 * 2 * rank // shape.grid
        groups = shape.block // (channels // width)
        assert shape.block <= 512
        assert groups * (32 // width) >= count
        assert shape.shared == (0 if groups == 1 else groups * (channels + 2) * 4)


@pytest.mark.parametrize(("code", "fewest", "step"), [("e4m3", 24, 8), ("int4", 32, 16)])
def test_even_tiles_hold_all_rows(code: str, fewest: int, step: int):
    """With no more of them than there need be for what one holds, and nothing that an MMA does not take."""
    op, division = (importlib.import_module(f"quantlab_kernels.mla_decode.{name}") for name in ("op", "division"))
    for rows in range(1, 300):
        tiles = division.even_tiles(op.Problem(1, rows, 1, 512, 64, 1024, code))
        assert all(fewest <= tile <= 64 and tile % step == 0 for tile in tiles)
        for tile in tiles[1:]:
            assert -(-rows // tile) * (tile - step) < rows
        assert -(-rows // tiles[-1]) == -(-rows // 64)


def test_rows_of_a_tile():
    """Few where a call is short: measured on an H200, each with the tile that was quickest."""
    op = importlib.import_module("quantlab_kernels.mla_decode.op")
    division = importlib.import_module("quantlab_kernels.mla_decode.division")

    def tile(code: str, heads: int, batch: int, tokens: int, sq: int = 1) -> int:
        return division.row_tile(op.Problem(batch, heads, sq, 512, 64, tokens, code))

    assert [tile("e4m3", *call) for call in ((64, 1, 1024), (128, 2, 3000), (20, 3, 12000))] == [24] * 3
    assert [tile("e4m3", *call) for call in ((48, 20, 1024), (96, 8, 1024), (20, 20, 12000))] == [24] * 3
    assert [tile("e4m3", *call) for call in ((64, 64, 1024), (128, 32, 1024), (32, 128, 4096))] == [32] * 3
    assert [tile("e4m3", *call) for call in ((64, 16, 1024), (128, 16, 1024), (128, 1, 12000))] == [32] * 3
    assert [tile("e4m3", *call) for call in ((80, 20, 12000), (40, 12, 12000), (72, 5, 50000))] == [40] * 3
    assert [tile("e4m3", *call) for call in ((96, 20, 12000), (96, 96, 1024), (56, 48, 6000))] == [48, 48, 56]
    assert [tile("e4m3", *call) for call in ((64, 16, 4096), (128, 128, 4096), (128, 1, 65536))] == [64] * 3
    assert [tile("int4", *call) for call in ((64, 10, 1500), (128, 16, 1024), (24, 96, 1024))] == [32] * 3
    assert [tile("int4", *call) for call in ((80, 20, 12000), (40, 12, 12000), (96, 96, 1024))] == [48] * 3
    assert [tile("int4", *call) for call in ((64, 16, 4096), (56, 48, 6000), (128, 1, 65536))] == [64] * 3
    assert [tile("int8", *call) for call in ((48, 1, 1024), (64, 16, 2048), (128, 32, 4096))] == [16, 32, 32]
    assert [tile("float", *call) for call in ((64, 1, 1024), (32, 8, 4096), (32, 24, 6000), (64, 16, 4096))] == [
        16,
        16,
        32,
        64,
    ]
    assert tile("e4m3", 16, 128, 4096) == tile("e4m3", 1, 1, 64) == 16
    assert tile("e4m3", 16, 16, 1024, sq=4) == tile("e4m3", 64, 16, 1024)


V3 = {"rank": 512, "rope": 64}
ON_A_GPU = [
    *(Case(name, (1500, 64, 1, 0), heads=heads, **V3) for name in FORMATS for heads in (5, 128)),
    *(Case(name, (700, 65), heads=16, sq=3, page=64, **V3) for name in FORMATS),
    *(Case(name, (700, 650), heads=5, start=(3, 130), **V3) for name in FORMATS),
    *(Case(name, (20000,), heads=16, even=True, **V3) for name in FORMATS),
    Case("fp8", (300, 17), heads=32, rank=256, rope=64),
    Case("int4", (300, 17), heads=40, rank=256, rope=32, page=16),
    Case("int8", (300, 17), heads=32, rank=128, rope=32, sq=2),
    Case("16bit", (300, 17), heads=40, rank=256, rope=32),
]
MANY_ROWS = [
    *(Case(name, (1500, 64, 1, 0), heads=64, **V3) for name in ("16bit", "fp8", "int4")),
    *(Case(name, (700, 65), heads=33, sq=2, page=64, **V3) for name in ("16bit", "fp8", "int4")),
    *(Case(name, (100, 60), heads=20, sq=3, page=16, start=(70, 7), **V3) for name in ("16bit", "fp8", "int4")),
    *(Case(name, (5000,), heads=128, even=True, **V3) for name in ("16bit", "fp8", "int4")),
    *(Case(name, (300, 17), heads=40, rank=256, rope=64) for name in ("16bit", "fp8")),
    # tiles of 64: none to three in a part, of which the first is hidden in part, or all of it from some queries
    *(Case(name, (64, 128, 192, 3, 65), heads=64, **V3) for name in ("16bit", "fp8", "int4")),
    *(Case(name, (2500, 2400, 700), heads=64, sq=3, start=(100, 0, 650), **V3) for name in ("16bit", "fp8", "int4")),
    # an even number of tiles of rows: CTAs in pairs
    *(Case("16bit", (64, 128, 192, 3, 0, 65), heads=heads, sq=sq, **V3) for heads, sq in ((100, 1), (64, 4))),
    Case("16bit", (2500, 2400, 700), heads=128, page=16, start=(100, 0, 650), **V3),
    Case("16bit", (300, 17, 700), heads=80, page=64, rank=256, rope=64),
]
FEWER_ROWS = [  # of a tile, in all of them or all but the last
    *(
        (tile, case)
        for name, tiles in (("fp8", (24, 32, 40, 48, 56)), ("int4", (32, 48)))
        for tile in tiles
        for case in (
            Case(name, (1500, 64, 1, 0), heads=tile, **V3),
            Case(name, (700, 65), heads=33, sq=2, page=64, **V3),
            Case(name, (100, 60), heads=20, sq=3, page=16, start=(70, 7), **V3),
            Case(name, (2500, 2400, 700), heads=64, sq=3, start=(100, 0, 650), **V3),
        )
    ),
    (40, Case("fp8", (300, 17), heads=80, rank=256, rope=64)),
]
ON_HOPPER = [
    *ON_A_GPU[:-3],
    *(Case(name, (700, 65), heads=heads, **V3) for name in FORMATS for heads in (1, 16, 20, 33, 64)),
    *(Case(name, (100, 60), heads=5, sq=2, page=16, start=(0, 7), **V3) for name in FORMATS),
    *(Case(name, (300, 17), heads=40, rank=256, rope=64) for name in FORMATS),
    *(Case(name, (0, 0), heads=16, **V3) for name in FORMATS),
    *(Case(name, (4000, 0, 70), heads=16, **V3) for name in ("16bit", "int4")),  # empty parts among many
]


def tiled_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sm90` takes the largest tile that a call fills, not the quickest, which has 16 rows in nearly all cases here."""
    sm90 = importlib.import_module("quantlab_kernels.mla_decode.sm90")

    def tile(problem: object) -> int:
        rows = problem.heads * problem.sq  # type: ignore[attr-defined]
        return 16 if rows <= 16 else 32 if rows <= 32 else 64

    monkeypatch.setattr(sm90, "row_tile", tile)
    monkeypatch.setattr(sm90, "config", sm90.config.__wrapped__)  # which would remember


def tiled_by(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """`sm90_rows` takes tiles of so many rows."""
    rows = importlib.import_module("quantlab_kernels.mla_decode.sm90_rows")
    monkeypatch.setattr(rows, "wide_tiles", lambda problem: (tile,))
    monkeypatch.setattr(rows, "config", rows.config.__wrapped__)


def test_the_largest_tiles_are_those_of_the_number_of_rows(monkeypatch: pytest.MonkeyPatch):
    op, sm90 = (importlib.import_module(f"quantlab_kernels.mla_decode.{module}") for module in ("op", "sm90"))
    tiled_by_rows(monkeypatch)

    def config(code: str, heads: int, rank: int = 512) -> tuple[int, int, int]:
        chosen = sm90.config(op.Problem(2, heads, 1, rank, 64, 1024, code))
        return chosen.rows, chosen.share, chosen.teams

    assert [config("float", heads) for heads in (5, 20, 33, 64)] == [(16, 1, 2), (32, 2, 1), (48, 2, 1), (64, 2, 1)]
    assert [config("int8", heads) for heads in (5, 20, 33, 64)] == [(16, 1, 3), (24, 1, 2), (48, 2, 1), (64, 2, 1)]
    assert [config("e4m3", heads) for heads in (5, 20, 33, 64)] == [(16, 1, 3), (24, 1, 2), (32, 1, 2), (32, 1, 2)]
    assert config("int8", 40, rank=256) == (32, 1, 2)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        *(("triton", case, torch.bfloat16) for case in ON_A_GPU),
        *(("triton", case, torch.float16) for case in ON_A_GPU[8:12]),
        *(("sm90", case, torch.bfloat16) for case in ON_HOPPER),
        *(("sm90", case, torch.float16) for case in ON_HOPPER[8:12]),
        *(("sm90_by_cost", case, torch.bfloat16) for case in ON_HOPPER if case.heads * case.sq > 16),
        *(("sm90_rows by 64", case, torch.bfloat16) for case in MANY_ROWS),
        *(("sm90_rows by 64", case, torch.float16) for case in MANY_ROWS[:3]),
        *((f"sm90_rows by {tile}", case, torch.bfloat16) for tile, case in FEWER_ROWS),
        *(("sm90_rows", case, torch.float16) for case in MANY_ROWS[:6]),
    ],
    ids=str,
)
def test_every_element(backend: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    if backend.startswith("sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for Hopper")
    if backend == "sm90":
        tiled_by_rows(monkeypatch)
    backend, _, tile = backend.partition(" by ")
    if tile:
        tiled_by(monkeypatch, int(tile))
    monkeypatch.setenv("QUANTLAB_MLA_DECODE_BACKEND", backend.removesuffix("_by_cost"))
    call = build(case, dtype, "cuda")
    narrow = backend.startswith("sm90") and case.format in ("fp8", "int4")
    check(mla_decode, call, narrow, narrow and (backend, case.format) != ("sm90_rows", "int4"))
    first, second = call.run(mla_decode), call.run(mla_decode)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu(sm=90)
@pytest.mark.parametrize("heads", [40, 64])
@pytest.mark.parametrize(
    ("name", "tile"), [*((name, tile) for name in FORMATS for tile in (16, 32)), ("16bit", 48), ("int8", 48)]
)
def test_every_tile_of_rows(name: str, tile: int, heads: int):
    """Also where the model of costs would choose another one."""
    op, sm90 = (importlib.import_module(f"quantlab_kernels.mla_decode.{module}") for module in ("op", "sm90"))

    def decode(
        q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor, *, scale: float, start: Tensor | None,
        block_table: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        teams = 1 if tile == 48 or (name == "16bit" and tile == 32) else 3 if tile == 16 and name != "16bit" else 2
        chosen = sm90.Config(tile, share=2 if teams == 1 else 1, teams=teams)
        problem = op._problem(q_latent, cache, block_table, 1536, 90)
        out, lse = op._empty(q_latent)
        sm90.launch(problem, q_latent, q_rope, cache, length, start, block_table, scale, out, lse, chosen)
        return out, lse

    for case in (Case(name, (1500, 64, 1, 0), heads=heads, **V3), Case(name, (700, 65), heads=heads, page=64, **V3)):
        check(decode, build(case, torch.bfloat16, "cuda"), name in ("fp8", "int4"))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("name", FORMATS)
def test_lengths_change_inside_a_graph(name: str):
    call = build(Case(name, (600, 512), heads=16, **V3), torch.bfloat16, "cuda")
    call.run(mla_decode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call.run(mla_decode)
    for lengths in ([600, 512], [1, 300], [0, 17]):
        call.length.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, call.run(mla_decode)[0])


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("name", FORMATS)
def test_queries_of_very_different_parts(name: str):
    """Positions' share of a query does not take the latents' bits away."""
    call = build(Case(name, (600, 512), heads=16, **V3), torch.bfloat16, "cuda")
    check(
        mla_decode, replace(call, q_rope=call.q_rope * 40, q_latent=call.q_latent * 0.5), narrow=name in ("fp8", "int4")
    )


@pytest.mark.gpu(sm=80)
def test_queries_of_another_layout():
    """As a model makes them: a transposed view."""
    call = build(Case("fp8", (600, 512), heads=16, **V3), torch.bfloat16, "cuda")
    strided = call.q_latent.transpose(1, 2).contiguous().transpose(1, 2)
    given = call.q_rope, call.cache, call.length
    assert torch.equal(
        mla_decode(strided, *given, scale=SCALE)[0], mla_decode(call.q_latent.contiguous(), *given, scale=SCALE)[0]
    )


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize(
    ("name", "heads", "batch"),
    [
        *((name, 16, 128) for name in FORMATS),
        *((name, heads, 32) for name in ("16bit", "fp8", "int4") for heads in (64, 128)),
        *((name, 40, 64) for name in ("fp8", "int4")),
    ],
)
def test_thousands_of_launches_agree(name: str, heads: int, batch: int, monkeypatch: pytest.MonkeyPatch):
    """Copies overtake no reading of what they replace, and end in any order: who takes one round of a ring for another
    fails once in hundreds or thousands of launches."""
    monkeypatch.setenv("QUANTLAB_MLA_DECODE_BACKEND", "sm90" if heads == 16 else "sm90_rows")
    q_latent, q_rope, cache, length = bench.build(name, heads, batch, 4096, torch.device("cuda"), 0)
    first = mla_decode(q_latent, q_rope, cache, length, scale=SCALE)[0].clone()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [mla_decode(q_latent, q_rope, cache, length, scale=SCALE)[0] for _ in range(6)]
        for out in outs:
            differs |= (out != first).any()
    for _ in range(1000):
        graph.replay()
    assert not differs
