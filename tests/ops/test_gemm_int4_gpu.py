"""Both INT4 rooms on the GPU: the Hopper kernel in all its configurations, Triton, the ops and their dispatch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantlab_kernels import gemm_int4, gemm_int4_fp8, prepare_int4, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common import launches, nvrtc
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.int4 import Int4Problem, repack_int4, unrepack_int4
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.gemm_int4 import op as wide_op
from quantlab_kernels.gemm_int4_fp8 import op as fp8_op
from quantlab_kernels.gemm_int4_fp8 import sm90, sm90_configs
from quantlab_kernels.gemm_int4_fp8.sm90_configs import Config
from quantlab_kernels.packing import pack_int4

gpu = pytest.mark.gpu(sm=80)
hopper = pytest.mark.gpu(sm=90)

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


def weight(n: int, k: int, *, lowest: int = -7, scale: torch.dtype = BF16):
    """Codes, words and scales that span three orders of magnitude."""
    generator = torch.Generator("cuda").manual_seed(5)
    codes = torch.randint(lowest, 8, (n, k), dtype=torch.int8, device="cuda", generator=generator)
    spread = torch.rand(n, k // 128, device="cuda", generator=generator) + 0.01
    scales = spread * torch.logspace(-3, 0, n, device="cuda")[:, None]
    return codes, pack_int4(codes), as_group_scale(scales.to(scale))


def activations(kind: str, m: int, k: int, x: torch.dtype, grouped: bool = False):
    values = operand(kind, m, k, seed=1, device="cuda")
    if x != E4M3:
        return values.to(x), None
    return (quantize_fp8_group if grouped else quantize_fp8_token)(values.to(BF16))


def exact_and_magnitude(a, a_scale, codes, b_scale, bias=None):
    wide = a.double()
    if a_scale is not None:
        wide = (wide.unflatten(1, (a_scale.shape[1], -1)) * a_scale.double()[:, :, None]).flatten(1)
    w = (codes.double().unflatten(1, (b_scale.shape[1], 128)) * b_scale.double()[:, :, None]).flatten(1)
    exact, magnitude = wide @ w.t(), wide.abs() @ w.abs().t()
    return (exact, magnitude) if bias is None else (exact + bias.double(), magnitude + bias.double().abs())


def check(out, a, a_scale, codes, b_scale, bias=None):
    exact, magnitude = exact_and_magnitude(a, a_scale, codes, b_scale, bias)
    accumulation = "fp8" if a.dtype == E4M3 else "float32"
    found = worst(out, exact, gemm_bound(exact, magnitude, a.shape[1], out.dtype, accumulation))
    assert found.ratio <= 1, found


def run(config, a, a_scale, tiles, b_scale, bias=None, dtype=BF16):
    out = torch.full((a.shape[0], b_scale.shape[0]), torch.nan, dtype=dtype, device="cuda")
    sm90.launch(a, a_scale, tiles, b_scale, bias, out, config)
    return out


def ready(configs, problem):
    """The same configurations, their kernels compiled side by side."""
    configs = list(configs)
    nvrtc.compile_all(sm90.source(config, problem) for config in configs)
    return configs


def tiles_for(words, x):
    return repack_int4(words, activation_bits=8 * x.itemsize)


@hopper
@pytest.mark.parametrize(("m", "n", "k"), [(1, 384, 1024), (13, 1224, 1152), (64, 584, 2048), (300, 1216, 1152)])
@pytest.mark.parametrize(("x", "grouped"), [(E4M3, False), (E4M3, True), (BF16, False), (FP16, False)])
def test_every_candidate_is_inside_the_bound_and_repeats_itself(m, n, k, x, grouped):
    codes, words, b_scale = weight(n, k)
    tiles = tiles_for(words, x)
    a, a_scale = activations("rows", m, k, x, grouped)
    problem = Int4Problem(m, n, k, x, grouped=grouped)
    for config in ready(sm90_configs.candidates(problem), problem):
        out = run(config, a, a_scale, tiles, b_scale)
        check(out, a, a_scale, codes, b_scale)
        assert torch.equal(out, run(config, a, a_scale, tiles, b_scale)), config


@hopper
@pytest.mark.parametrize(("x", "grouped"), [(E4M3, False), (E4M3, True), (BF16, False)])
def test_every_default_configuration_is_right(x, grouped):
    """Also with short rings, since long ones do not go round in so few blocks of K."""
    shapes = (512, 7168), (4096, 4096), (24576, 1536), (4096, 14336), (7168, 2048)
    tokens = (1, 32, 64) if grouped else (1, 16, 32, 64, 96, 128, 256, 2048)
    problems = (Int4Problem(m, n, k, x, grouped=grouped) for m in tokens for n, k in shapes)
    configs = {sm90_configs.default(problem) for problem in problems}
    configs |= {replace(c, stages=min(c.stages, max(3, 2 * c.k_groups))) for c in configs}
    codes, words, b_scale = weight(1224, 1152)
    tiles = tiles_for(words, x)
    for config in ready(configs, Int4Problem(1, 1224, 1152, x, grouped=grouped)):
        m = config.by - 3 if config.token_scales else 2 * config.by + 5
        assert sm90_configs.reject(config, Int4Problem(m, 1224, 1152, x, grouped=grouped)) is None, config
        a, a_scale = activations("positive", m, 1152, x, grouped)
        check(run(config, a, a_scale, tiles, b_scale), a, a_scale, codes, b_scale)


@hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [E4M3, BF16, FP16])
def test_every_kind_of_data(kind, x):
    codes, words, b_scale = weight(1024, 4096)
    for m in (16, 256, 1000):
        a, a_scale = activations(kind, m, 4096, x)
        if not a.float().isfinite().all():
            continue  # outliers beyond float16
        config = sm90.config(Int4Problem(m, 1024, 4096, x))
        check(run(config, a, a_scale, tiles_for(words, x), b_scale), a, a_scale, codes, b_scale)


@hopper
@pytest.mark.parametrize("x", [E4M3, BF16])
def test_integers_come_out_exactly(x):
    """Codes times -1, 0 and 1, scales of powers of two: every sum is an integer that float32 holds. A register of the
    MMA's operand that was given away too early, or a K block that was counted twice, cannot hide in an error bound."""
    n, k = 640, 16384
    codes, words, _ = weight(n, k)
    b_scale = as_group_scale((2.0 ** (torch.arange(n * k // 128, device="cuda") % 3)).view(n, -1).to(BF16))
    tiles = tiles_for(words, x)
    generator = torch.Generator("cuda").manual_seed(9)
    for m in (1, 200):
        values = torch.randint(-1, 2, (m, k), device="cuda", generator=generator).float()
        a, a_scale = values.to(x), torch.ones(m, 1, device="cuda") if x == E4M3 else None
        exact, _ = exact_and_magnitude(a, a_scale, codes, b_scale)
        problem = Int4Problem(m, n, k, x, FP32)
        cut = [c for c in sm90_configs.candidates(problem) if c.stream == 2 or c.split > 1]
        for config in ready(cut, problem):
            for _ in range(3):
                assert torch.equal(run(config, a, a_scale, tiles, b_scale, dtype=FP32).double(), exact), config


@hopper
@pytest.mark.parametrize(
    ("dtype", "bias_dtype", "scale"),
    [(BF16, BF16, FP16), (BF16, FP16, FP32), (FP16, FP32, BF16), (FP16, None, FP32), (FP32, BF16, BF16)],
)
def test_dtypes_of_scales_bias_and_result(dtype, bias_dtype, scale):
    for n in (264, 259):  # with the copy engine and without
        codes, words, b_scale = weight(n, 512, scale=scale)
        bias = None if bias_dtype is None else torch.linspace(-2, 2, n, device="cuda").to(bias_dtype)
        a, a_scale = activations("normal", 37, 512, E4M3)
        out = run(Config(2, 1, 64, stages=4), a, a_scale, tiles_for(words, E4M3), b_scale, bias, dtype)
        check(out, a, a_scale, codes, b_scale, bias)


@hopper
@pytest.mark.parametrize(("x", "grouped"), [(E4M3, False), (E4M3, True), (BF16, False)])
def test_many_tiles_for_each_cta(x, grouped):
    """More than one wave: persistent CTAs, tiles in parts before whole ones, accumulators and barriers used again."""
    for m, n, k in ((1500, 4160, 1024), (16, 20_000, 512)):
        codes, words, b_scale = weight(n, k)
        a, a_scale = activations("normal", m, k, x, grouped)
        by = 16 if m == 16 else 128
        problem = Int4Problem(m, n, k, x, grouped=grouped)
        shapes = [Config(2, 1, by, prefetch=0), Config(3, 1, by, prefetch=0), Config(1, 4, 64, prefetch=0)]
        shapes += [Config(2, 1, 192, prefetch=0, parts=4), Config(2, 1, 160, prefetch=0, parts=2)]
        deepest = (sm90_configs.deepest(shape, problem) for shape in shapes)
        for deep in ready((d for d in deepest if sm90_configs.reject(d, problem) is None), problem):
            for stream in (0, 1, 2):
                config = replace(deep, stream=stream)
                for _ in range(4 if sm90_configs.reject(config, problem) is None else 0):
                    out = run(config, a, a_scale, tiles_for(words, x), b_scale)
                    check(out, a, a_scale, codes, b_scale)


@hopper
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(256, 28672, 4096), (640, 28672, 4096), (256, 4096, 14336), (1, 4096, 14336)]
)
def test_sums_of_other_ctas_are_there_when_they_are_read(m, n, k, grouped, monkeypatch):
    """What CTAs leave for each other starts as NaN, where the launch before would have left plausible sums."""
    handover = sm90.handover

    def poisoned(config, x):
        partials, flags = handover(config, x)
        return (None if partials is None else partials.fill_(torch.nan)), flags

    monkeypatch.setattr(sm90, "handover", poisoned)
    codes, words, b_scale = weight(n, k)
    a, a_scale = activations("normal", m, k, E4M3, grouped)
    tiles = tiles_for(words, E4M3)
    config = sm90.config(Int4Problem(m, n, k, E4M3, grouped=grouped))
    if not config.stream:
        config = replace(config, stream=2, split=1)
    first = run(config, a, a_scale, tiles, b_scale)
    check(first, a, a_scale, codes, b_scale)
    for _ in range(6):
        assert torch.equal(run(config, a, a_scale, tiles, b_scale), first)


@hopper
@pytest.mark.parametrize("m", [256, 700])
def test_a_stage_is_given_back_when_its_scales_have_arrived(m):
    """On these tiles the last scales of tokens were still on their way when their stage was filled again, which gave
    wrong sums in every run of 256 tokens."""
    codes, words, b_scale = weight(28672, 4096)
    tiles = tiles_for(words, E4M3)
    problem = Int4Problem(m, 28672, 4096, E4M3, grouped=True)
    config = sm90_configs.deepest(Config(3, 1, 128, prefetch=0, stream=1), problem)
    a, a_scale = activations("rows", m, 4096, E4M3, grouped=True)
    first = run(config, a, a_scale, tiles, b_scale)
    check(first, a, a_scale, codes, b_scale)
    for _ in range(20):
        assert torch.equal(run(config, a, a_scale, tiles, b_scale), first)


@hopper
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    ("m", "x", "config"),
    [
        (16, E4M3, Config(1, 4, 16)), (16, E4M3, Config(1, 4, 16, stream=0, token_scales=8192, early=1)),
        (200, BF16, Config(2, 1, 128, prefetch=0, parts=2, stages=4)),
    ],
)  # fmt: skip
def test_tokens_that_are_written_late(m, x, config, waits, late_results, without_wait, monkeypatch):
    """The kernel starts before its tokens are there. One that does not wait for them shows that this can fail."""
    codes, words, b_scale = weight(2048, 2048)
    tiles = tiles_for(words, x)
    a, a_scale = activations("normal", m, 2048, x, grouped=config.token_scales > 0)
    expected = run(config, a, a_scale, tiles, b_scale)  # the weights are known from here on
    check(expected, a, a_scale, codes, b_scale)

    monkeypatch.setattr(sm90, "_prepared", sm90._prepared.__wrapped__)  # which would remember the kernel
    if not waits:
        monkeypatch.setattr(sm90, "kernel", without_wait(sm90.source, "gemm_int4"))
    run(config, a, a_scale, tiles, b_scale)  # its code is loaded
    found = late_results(lambda late, out: sm90.launch(late, a_scale, tiles, b_scale, None, out, config), a, expected)
    assert all(found) if waits else not all(found)


@hopper
def test_nothing_outside_the_result_is_written():
    codes, words, b_scale = weight(200, 512)
    a, a_scale = activations("normal", 37, 512, E4M3)
    for dtype in (BF16, FP32):
        wide = torch.full((60, 320), torch.nan, dtype=dtype, device="cuda")
        out = wide[8:45, 64:264]
        sm90.launch(a, a_scale, tiles_for(words, E4M3), b_scale, None, out, Config(2, 1, 64, stages=4))
        check(out, a, a_scale, codes, b_scale)
        assert int(wide.isnan().sum()) == wide.numel() - out.numel()


@hopper
@pytest.mark.parametrize("m", [16, 300])
def test_graphs_replay_on_fresh_data(m):
    codes, words, b_scale = weight(4096, 2048)
    tiles = tiles_for(words, E4M3)
    a, a_scale = activations("normal", m, 2048, E4M3)
    expected = gemm_int4_fp8(a, a_scale, tiles, b_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            out = gemm_int4_fp8(a, a_scale, tiles, b_scale)
    graph.replay()
    assert torch.equal(out, expected)
    for seed in range(3):
        fresh, scale = quantize_fp8_token(operand("normal", m, 2048, seed=seed, device="cuda").to(BF16))
        a.copy_(fresh)
        a_scale.copy_(scale)
        out.fill_(torch.nan)
        graph.replay()
        check(out, a, a_scale, codes, b_scale)


@hopper
def test_a_weight_goes_where_it_is_fastest_and_stays_right():
    for lowest, bits, tiled in ((-7, 8, True), (-8, 8, False), (-8, 16, True)):
        codes, words, b_scale = weight(200, 384, lowest=lowest)
        prepared = prepare_int4(words, activation_bits=bits)
        assert (prepared.dim() > 2) == tiled
        assert not tiled or torch.equal(unrepack_int4(prepared, 200), words)
        a, a_scale = activations("normal", 20, 384, E4M3 if bits == 8 else BF16)
        for _ in range(2):
            out = gemm_int4_fp8(a, a_scale, prepared, b_scale) if bits == 8 else gemm_int4(a, prepared, b_scale)
            check(out, a, a_scale, codes, b_scale)


@gpu
@pytest.mark.parametrize("x", [E4M3, BF16, FP16])
@pytest.mark.parametrize("m", [3, 70, 300])
def test_words_run_on_triton(x, m):
    codes, words, b_scale = weight(328, 1152, lowest=-8)
    bias = torch.linspace(-1, 1, 328, device="cuda")
    for grouped in (False, True) if x == E4M3 else (False,):
        a, a_scale = activations("outliers", m, 1152, x, grouped)
        if x == E4M3:
            problem = fp8_op.problem_of(a, a_scale, words, b_scale, bias, BF16)
            assert fp8_op.BACKENDS.select(problem).__name__.endswith("triton")
            out = gemm_int4_fp8(a, a_scale, words, b_scale, bias)
        else:
            if not a.float().isfinite().all():
                continue
            problem = wide_op.problem_of(a, words, b_scale, bias)
            assert wide_op.BACKENDS.select(problem).__name__.endswith("triton")
            out = gemm_int4(a, words, b_scale, bias)
        check(out, a, a_scale, codes, b_scale, bias)


@gpu
def test_empty_batches_and_layouts_that_are_copied():
    codes, words, b_scale = weight(72, 256)
    a, a_scale = activations("normal", 5, 256, E4M3, grouped=True)
    expected = gemm_int4_fp8(a, a_scale, words, b_scale)
    check(expected, a, a_scale, codes, b_scale)
    assert torch.equal(gemm_int4_fp8(a, a_scale.contiguous(), words, b_scale.contiguous()), expected)
    assert gemm_int4_fp8(a[:0], a_scale[:0], words, b_scale).shape == (0, 72)
    assert gemm_int4(a[:0].to(BF16), words, b_scale).shape == (0, 72)


@hopper
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # inductor captures an empty one to own a memory pool
def test_flags_that_a_graph_is_warmed_up_with_are_not_of_its_memory(monkeypatch):
    """As in `generate` with a static cache: inductor refuses a graph whose pool still holds something afterwards."""
    monkeypatch.setattr(launches, "_STREAM_FLAGS", {})
    monkeypatch.setenv("QUANTLAB_GEMM_INT4_FP8_BACKEND", "sm90")
    codes, words, b_scale = weight(256, 16384)
    a, a_scale = activations("normal", 1, 16384, E4M3, grouped=True)
    tiles = tiles_for(words, a)
    monkeypatch.setattr(sm90, "config", lambda problem: sm90_configs.deepest(Config(1, 2, 16, stream=2), problem))

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def call(a, a_scale):
        return gemm_int4_fp8(a, a_scale, tiles, b_scale) * 2

    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        check(call(a, a_scale) / 2, a, a_scale, codes, b_scale)
    assert launches._STREAM_FLAGS
