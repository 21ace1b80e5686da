"""attention_prefill: the definition against torch, every backend against the definition, element by element."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab_kernels import attention_8bit, attention_prefill, attention_quantize
from quantlab_kernels.attention_prefill import errors, reference
from quantlab_kernels.attention_prefill.bounds import attention_bound
from quantlab_kernels.attention_prefill.op import limits
from quantlab_kernels.attention_prefill.reference import Attributes
from quantlab_kernels.attention_quantize import reference as quantization
from quantlab_kernels.attention_quantize.op import Quantized
from quantlab_kernels.common.bounds import UNIT_ROUNDOFF, worst


def inputs(
    batch: int, heads: tuple[int, int], lengths: tuple[int, int], d: int, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 queries of different sharpness, keys with a bias per channel, values with a mean."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = draw(batch, heads[0], lengths[0], d) * torch.linspace(0.5, 3, lengths[0])[:, None]
    k = draw(batch, heads[1], lengths[1], d) + 3 * draw(heads[1], 1, d)
    v = draw(batch, heads[1], lengths[1], d) + 1
    return q.to(device, torch.bfloat16), k.to(device, torch.bfloat16), v.to(device, torch.bfloat16)


def brute_mask(sq: int, skv: int, left: int, right: int, first: int, last: int) -> Tensor:
    rows = [
        [
            first <= j < last and (left < 0 or j >= i + skv - sq - left) and (right < 0 or j <= i + skv - sq + right)
            for j in range(skv)
        ]
        for i in range(sq)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(sq, skv)


SPAN = st.integers(1, 24)


@settings(max_examples=60)
@given(SPAN, SPAN, st.integers(-1, 10), st.integers(-1, 10), st.integers(-2, 12), st.integers(0, 30))
def test_visible_is_the_mask(sq: int, skv: int, left: int, right: int, first: int, last: int):
    key_range = torch.tensor([[first, last]], dtype=torch.int32)
    low, high = reference.visible(sq, skv, left, right, key_range)
    key = torch.arange(skv)
    seen = (key >= low[0, :, None]) & (key < high[0, :, None])
    assert torch.equal(seen, brute_mask(sq, skv, left, right, max(first, 0), min(last, skv)))


def test_packed_sequences_see_only_themselves():
    lengths_q, lengths_k = [3, 0, 5, 2], [4, 2, 5, 7]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (lengths_q, lengths_k)
    )
    for left, right in [(-1, -1), (-1, 0), (2, 0)]:
        low, high = reference.visible(sum(lengths_q), sum(lengths_k), left, right, None, cu_q, cu_k)
        key = torch.arange(sum(lengths_k))
        seen = (key >= low[0, :, None]) & (key < high[0, :, None])
        blocks = [brute_mask(a, b, left, right, 0, b) for a, b in zip(lengths_q, lengths_k, strict=True)]
        assert torch.equal(seen, torch.block_diag(*(b.int() for b in blocks)).bool())


def test_limits():
    assert limits(False, None) == (-1, -1)
    assert limits(True, None) == (-1, 0)
    assert limits(True, 4) == (3, 0)
    assert limits(False, 4) == (3, 3)
    assert limits(False, (5, -1)) == (5, -1)
    assert limits(True, (5, 2)) == (5, 0)
    with pytest.raises(ValueError, match="window = 0, needs at least 1 key"):
        limits(True, 0)


@pytest.mark.parametrize("d", [64, 80, 128])
def test_close_to_torch(d: int):
    """The whole way, 8 bits included, beside torch in float32 on the same inputs."""
    q, k, v = (x.float() for x in inputs(2, (4, 2), (40, 200), d))
    out, lse = attention_8bit(q, k, v, causal=True)
    mask = brute_mask(40, 200, -1, 0, 0, 200)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask)
    error = (out.transpose(1, 2) - exact).square().mean().sqrt() / (exact - 1).square().mean().sqrt()
    assert error < 0.03
    scores = (q @ wide[0].transpose(2, 3) * d**-0.5).masked_fill(~mask, -torch.inf)
    assert (lse - scores.logsumexp(3)).abs().max() < 0.2


def test_softcap_and_sinks_see_the_mean_of_the_keys():
    """Both are not blind to what all keys have in common, which the codes lack."""
    q, k, v = (x.float() for x in inputs(1, (2, 1), (16, 100), 64))
    sinks = torch.tensor([-1.0, 6.0])
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3)) * 64**-0.5
    for softcap in (0.0, 5.0):
        capped = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = torch.cat([capped, sinks.view(1, 2, 1, 1).expand(1, 2, 16, 1)], 3).softmax(3)[..., :-1]
        exact = weights @ v.repeat_interleave(2, 1)
        out, _ = attention_8bit(q, k, v, softcap=softcap, sinks=sinks)
        assert (out.transpose(1, 2) - exact).square().mean().sqrt() < 0.05


def test_rows_that_see_nothing():
    q, k, v = inputs(2, (2, 2), (10, 6), 64)
    out, lse = attention_8bit(q, k, v, causal=True)  # the first 4 queries stand before all keys
    assert (out[:, :4] == 0).all()
    assert (lse[:, :, :4] == -torch.inf).all()
    assert (lse[:, :, 4:] > -torch.inf).all()
    out, lse = attention_8bit(q, k, v, key_range=torch.tensor([[3, 3], [0, 6]], dtype=torch.int32))
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert (lse[1] > -torch.inf).all()


def test_traces_and_refuses():
    q, k, v = inputs(1, (4, 2), (5, 40), 64)
    z = attention_quantize(q, k, v)
    options = (0.125, -1, 0, 0.0, torch.zeros(4), None, None, None, torch.bfloat16)
    op = torch.ops.quantlab.attention_prefill.default
    torch.library.opcheck(op, (*z, *options), test_utils="test_faketensor")
    compiled = torch.compile(lambda *x: attention_8bit(*x, causal=True), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v)[0], attention_8bit(q, k, v, causal=True)[0])
    with pytest.raises(RuntimeError, match=r"v_scale \(1, 2, 1\), needs|v_scale .*what attention_quantize writes"):
        attention_prefill(z._replace(v_scale=z.v_scale[..., :0]))
    with pytest.raises(RuntimeError, match="needs int8 or float8_e4m3fn"):
        attention_prefill(z._replace(q=z.q.float()))
    with pytest.raises(RuntimeError, match="needs a float of each of 4 heads"):
        attention_prefill(z, sinks=torch.zeros(2))
    with pytest.raises(RuntimeError, match="cu_seqlens_q and cu_seqlens_k"):
        attention_prefill(z, cu_seqlens_q=torch.zeros(2, dtype=torch.int32))


# ---- a backend against the definition; the interpreter's run below uses the same ----


def options_of(case: dict[str, Any], heads: int, device: str) -> dict[str, Any]:
    """The case's masks as tensors."""
    made = dict(case)
    for name in ("key_range", "cu_seqlens_q", "cu_seqlens_k"):
        if name in made:
            made[name] = torch.tensor(made[name], dtype=torch.int32, device=device)
    if made.get("sinks"):
        made["sinks"] = torch.linspace(-1, 5, heads, device=device)
    return made


def check(z: Quantized, out: Tensor, lse: Tensor, rms: float, **options: Any) -> None:
    """Element by element, and the size of the error as a whole."""
    batch, heads, sq, d = z.q.shape
    skv = z.k.shape[2]
    left, right = limits(options.get("causal", False), options.get("window"))
    attributes = Attributes(options.get("scale", d**-0.5), left, right, options.get("softcap", 0.0))
    masks = [options.get(name) for name in ("key_range", "cu_seqlens_q", "cu_seqlens_k")]
    low, high = (x.to(out.device) for x in reference.visible(sq, skv, left, right, *masks))
    exact, exact_lse = reference.attend(z, attributes, low, high, options.get("sinks"))
    seen = exact_lse.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert (lse.double() - exact_lse)[seen].abs().amax() < 0.1 if seen.any() else True
    missing = [name for name, tensor in zip(Quantized._fields, z, strict=True) if tensor.float().isnan().any()]
    assert not out.isnan().any(), f"{int(out.isnan().sum())} of {out.numel()} are NaN; of the operands: {missing}"
    centred = exact - z.v_mean.double().repeat_interleave(heads // z.v_mean.shape[1], 1)[:, None]
    error = out.double() - exact
    rounding = UNIT_ROUNDOFF[out.dtype] * exact.square().mean().sqrt()
    assert error.square().mean().sqrt() <= rms * centred.square().mean().sqrt() + rounding
    for b in range(batch):
        for h in range(heads):
            weights = exact_weights(z, attributes, low[b % low.shape[0]], high[b % high.shape[0]], b, h)
            bound = attention_bound(exact[b, :, h], weights, z, out.dtype, b, h)
            found = worst(out[b, :, h], exact[b, :, h], bound)
            assert found.ratio <= 1, f"batch {b} head {h}: {found}"


def exact_weights(z: Quantized, attributes: Attributes, low: Tensor, high: Tensor, b: int, h: int) -> Tensor:
    """[Sq, Skv] float64 softmax of one head, 0 where nothing is seen."""
    kv = h // (z.q.shape[1] // z.k.shape[1])
    q = quantization.dequantize_queries(z.q[b : b + 1, h : h + 1], z.q_scale[b : b + 1, h : h + 1])[0, 0]
    k = quantization.dequantize_keys(z.k[b : b + 1, kv : kv + 1], z.k_scale[b : b + 1, kv : kv + 1])[0, 0]
    scores = (q @ k.T + z.q_shift[b, h, :, None].double()) * attributes.scale
    if attributes.softcap:
        scores = attributes.softcap * torch.tanh(scores / attributes.softcap)
    key = torch.arange(z.k.shape[2], device=scores.device)
    seen = (key >= low[:, None]) & (key < high[:, None])
    return scores.masked_fill(~seen, -torch.inf).softmax(1).nan_to_num(0.0)


def test_error_report_on_the_cpu():
    """The order of what is compared, and that neither a bias of the keys nor a mean of the values costs anything."""
    found = {(error.inputs, error.operands): error for error in errors.report("cpu", tokens=256, lengths=(1024,))}
    for inputs in ("outliers 256", "normal 256", "keys with a bias 256", "1024 keys, values of mean 0"):
        relative = [found[inputs, operands].relative for operands in ("bf16", "int8 int8", "int8 fp8", "fp8 fp8")]
        assert relative == sorted(relative), inputs
    for operands in ("int8 int8", "fp8 fp8"):
        assert found["keys with a bias 256", operands].rms < 1.2 * found["normal 256", operands].rms
        assert found["1024 keys, values of mean 1", operands].relative < 5e-3


INTERPRETED = """
import importlib, torch
torch.set_num_threads(1)
op = importlib.import_module("quantlab_kernels.attention_prefill.op")
from quantlab_kernels.attention_prefill import triton
from quantlab_kernels.attention_prefill.reference import Attributes
from quantlab_kernels import attention_quantize
import test_attention_prefill as tests
CASES = [
    (64, (2, 1), (70, 150), "int8", 90, dict(causal=True, window=90)),
    (64, (1, 1), (40, 200), "fp8", 80, dict(softcap=4.0)),
    (80, (1, 1), (20, 140), "int8", 90, dict(sinks=True, key_range=[[5, 130]])),
    (64, (1, 1), (90, 100), "int8", 90, dict(causal=True, cu_seqlens_q=[0, 30, 30, 90], cu_seqlens_k=[0, 35, 37, 100])),
]
for d, heads, lengths, fmt, sm, case in CASES:
    options = tests.options_of(case, heads[0], "cpu")
    q, k, v = (x.float() for x in tests.inputs(1, heads, lengths, d))
    z = attention_quantize(q, k, v, key_range=options.get("key_range"), qk=fmt, pv=fmt)
    left, right = op.limits(options.get("causal", False), options.get("window"))
    names = ("sinks", "key_range", "cu_seqlens_q", "cu_seqlens_k")
    problem = op.Problem(1, *heads, *lengths, d, qk=z.q.dtype, pv=z.v.dtype, out_dtype=torch.float32, sm=sm)
    out, lse = torch.full((1, lengths[0], heads[0], d), torch.nan), torch.full((1, heads[0], lengths[0]), torch.nan)
    attributes = Attributes(d**-0.5, left, right, options.get("softcap", 0.0))
    triton.launch(problem, z, attributes, *(options.get(n) for n in names), out, lse)
    tests.check(z, out, lse, 0.05, **options)
"""


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED)


# ---- on a GPU ----

RMS = {"sm90": {"int8": 0.03, "fp8": 0.05}, "triton": {"int8": 0.05, "fp8": 0.05}}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.gpu(sm=sm)) for name, sm in (("sm90", 90), ("triton", 80))]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    monkeypatch.setenv("QUANTLAB_ATTENTION_PREFILL_BACKEND", request.param)
    return request.param


def run(
    backend: str, batch: int, heads: tuple[int, int], lengths: tuple[int, int], d: int, fmt: str, case: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    options = options_of(case, heads[0], "cuda")
    q, k, v = inputs(batch, heads, lengths, d, "cuda", seed=sum(lengths))
    z = attention_quantize(q, k, v, key_range=options.get("key_range"), qk=fmt, pv=fmt)
    out, lse = attention_prefill(z, out_dtype=dtype, **options)
    check(z, out, lse, RMS[backend][fmt], **options)


def draw(seed: int) -> tuple[Any, ...]:
    """A problem that nobody would have thought of."""
    r = random.Random(seed)
    heads_kv = r.choice([1, 2, 3])
    heads = heads_kv * r.choice([1, 2, 4]), heads_kv
    d, fmt = r.choice([64, 64, 80, 128, 128]), r.choice(["int8", "int8", "fp8"])
    case: dict[str, Any] = {"causal": r.random() < 0.6}
    if r.random() < 0.4:
        case["window"] = r.choice([1, 17, 100, 128, 300])
    if r.random() < 0.2:
        case["softcap"] = 8.0
    if r.random() < 0.3:
        case["sinks"] = True
    if r.random() < 0.3:
        pieces_q, pieces_k = ([r.choice([0, 1, 5, 127, 128, 129, 300]) for _ in range(4)] for _ in range(2))
        case["cu_seqlens_q"] = [sum(pieces_q[:i]) for i in range(5)]
        case["cu_seqlens_k"] = [sum(pieces_k[:i]) for i in range(5)]
        lengths = max(1, sum(pieces_q)), max(1, sum(pieces_k))
        return 1, heads, lengths, d, fmt, case
    batch, lengths = r.choice([1, 2]), (r.choice([1, 7, 64, 128, 130, 257, 640]), r.choice([1, 100, 128, 333, 1025]))
    if r.random() < 0.4:
        ends = [sorted(r.randint(0, lengths[1]) for _ in range(2)) for _ in range(batch)]
        case["key_range"] = ends
    return batch, heads, lengths, d, fmt, case


@pytest.mark.gpu(sm=90)
@pytest.mark.parametrize("seed", range(28))
def test_random_problems_on_hopper(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_ATTENTION_PREFILL_BACKEND", "sm90")
    run("sm90", *draw(seed))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("seed", [4, 5, 6, 18])  # variants take seconds each to compile
def test_random_problems_in_triton(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTLAB_ATTENTION_PREFILL_BACKEND", "triton")
    run("triton", *draw(seed))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize(("d", "fmt"), [*((d, "int8") for d in (64, 80, 96, 128, 192, 256)), (96, "fp8"), (192, "fp8")])
def test_head_dimensions(d: int, fmt: str):
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if d == 128 else (torch.bfloat16,):
        q, k, v = inputs(1, (2, 1), (200, 300), d, "cuda")
        z = attention_quantize(q, k, v, qk=fmt, pv=fmt)
        check(z, *attention_prefill(z, causal=True, out_dtype=dtype), 0.05, causal=True)


def relative(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def test_long_context_keeps_the_mean_of_the_values(backend: str):
    """A sum that stays in Hopper's FP8 accumulator loses half of it at this length."""
    for mean, limit in ((1.0, 3e-3), (0.0, 0.032)):
        q, k, v = (torch.randn(1, 1, s, 128, device="cuda", dtype=torch.bfloat16) for s in (256, 131072, 131072))
        v += mean
        exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        out, _ = attention_8bit(q, k, v)
        assert relative(out.transpose(1, 2), exact) < (limit if backend == "sm90" else 1.5 * limit)


def short_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """E4M3 as Hopper adds it: weights relative to the largest, a sum of 13 bits over all keys, 32 at a time."""
    scores = q.float() @ k.float().T * q.shape[1] ** -0.5
    weights = torch.exp(scores - scores.amax(1, keepdim=True))
    codes, values = ((256 * weights).to(torch.float8_e4m3fn).float(), v.to(torch.float8_e4m3fn).float())
    total = torch.zeros_like(q, dtype=torch.float32)
    for i in range(0, k.shape[0], 32):
        total += codes[:, i : i + 32] @ values[i : i + 32]
        total = (total.view(torch.int32) & -1024).view(torch.float32)
    return total / 256 / weights.sum(1, keepdim=True)


@pytest.mark.gpu(sm=80)
def test_needles_are_found_at_128k():
    """Each query looks for one key among 131072, which has a sixth of its weight; values are words around a mean."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2, (4096, 128), generator=generator) * 2.0 - 1
    q, k = torch.randn(32, 128, generator=generator), torch.randn(131072, 128, generator=generator)
    place, word = (
        torch.randperm(131072, generator=generator)[:32],
        torch.randint(0, 4096, (131072,), generator=generator),
    )
    k[place] = 0.94 * q
    q, k, v = (x.to("cuda", torch.bfloat16)[None, None] for x in (q, k, 1 + words[word] / 4))

    def found(out: Tensor) -> float:
        said = ((out.float().cpu() - 1) @ words.T).argmax(1)
        return float((said == word[place]).float().mean())

    assert found(F.scaled_dot_product_attention(q, k, v)[0, 0]) == 1
    assert found(short_sums(q[0, 0], k[0, 0], v[0, 0])) < 0.75
    for fmt in ("int8", "fp8"):
        assert found(attention_8bit(q, k, v, qk=fmt, pv=fmt)[0][0, :, 0]) == 1, fmt


def test_keys_with_a_bias_cost_nothing(backend: str):
    q, k, v = (torch.randn(1, 2, s, 128, device="cuda", dtype=torch.bfloat16) for s in (512, 4096, 4096))
    biased = k + 8 * torch.randn(1, 2, 1, 128, device="cuda", dtype=torch.bfloat16)
    errors = []
    for keys in (k, biased):
        exact = F.scaled_dot_product_attention(q.float(), keys.float(), v.float())
        errors.append(relative(attention_8bit(q, keys, v)[0].transpose(1, 2), exact))
    assert errors[1] < 1.3 * errors[0] < 0.05


def test_a_sink_hides_nothing(backend: str):
    """Probabilities that are far below the first one still count in the sum of many."""
    q, k, v = (torch.randn(1, 1, s, 128, device="cuda", dtype=torch.bfloat16) for s in (256, 16384, 16384))
    direction = F.normalize(torch.randn(128, device="cuda"), dim=0).to(torch.bfloat16)
    q, k = 0.3 * q + 8 * direction, 0.3 * k
    k[:, :, 0] += 12 * direction
    v[:, :, 1:] += 1
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert relative(attention_8bit(q, k, v)[0].transpose(1, 2), exact) < 0.02


@pytest.mark.parametrize("size", [1e-4, 30.0, 120.0])
def test_scores_of_any_size(backend: str, size: float):
    """Nearly equal weights, whose scores are far from those that are hidden only by definition, and a single one."""
    q, k, v = inputs(1, (2, 1), (200, 700), 128, "cuda")
    z = attention_quantize(size * q, k, v)
    check(z, *attention_prefill(z, causal=True), RMS[backend]["int8"], causal=True)


def test_more_heads_than_are_worked_on_together(backend: str):
    q, k, v = inputs(1, (3, 3), (300, 17000), 128, "cuda")
    z = attention_quantize(q, k, v)
    check(z, *attention_prefill(z, causal=True), RMS[backend]["int8"], causal=True)


def test_padding_may_be_anything(backend: str):
    q, k, v = inputs(2, (4, 2), (300, 300), 128, "cuda")
    key_range = torch.tensor([[37, 300], [0, 210]], dtype=torch.int32, device="cuda")
    clean = attention_8bit(q, k, v, causal=True, key_range=key_range)[0]
    for x in (k, v):
        x[0, :, :37] = torch.nan
        x[1, :, 210:] = torch.inf
    q[0, :, :37] = torch.nan
    dirty = attention_8bit(q, k, v, causal=True, key_range=key_range)[0]
    assert torch.equal(clean[0, 37:], dirty[0, 37:])
    assert torch.equal(clean[1], dirty[1])


def test_repeats_bit_for_bit(backend: str):
    q, k, v = inputs(2, (4, 2), (700, 900), 128, "cuda")
    first, lse = attention_8bit(q, k, v, causal=True)
    for _ in range(5):
        again, lse_again = attention_8bit(q, k, v, causal=True)
        assert torch.equal(first, again)
        assert torch.equal(lse, lse_again)


def test_graph_and_compile(backend: str):
    q, k, v = inputs(1, (4, 2), (300, 300), 128, "cuda")
    expected = attention_8bit(q, k, v, causal=True)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_8bit(q, k, v, causal=True)[0]
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
    compiled = torch.compile(lambda *x: attention_8bit(*x, causal=True)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), expected)


def test_not_the_first_device_memory(backend: str):
    """Nothing is written outside of the output."""
    q, k, v = inputs(1, (3, 1), (130, 129), 80, "cuda")
    z = attention_quantize(q, k, v)
    canary = torch.full((64, 4096), 7.0, device="cuda")
    attention_prefill(z, causal=True)
    torch.cuda.synchronize()
    assert (canary == 7).all()
