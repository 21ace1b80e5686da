"""The Hopper kernel on the GPU: every kind of configuration, on shapes that leave tiles ragged."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace

import pytest
import torch

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import GemmProblem, empty_group_scale
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.common.tuning import table
from quantlab_kernels.gemm_fp8_block import reference, sm90, sm90_configs
from quantlab_kernels.gemm_fp8_row import reference as row_reference
from quantlab_kernels.quantize_fp8 import reference as quantizer

pytestmark = pytest.mark.gpu(sm=90)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def operands(m: int, n: int, k: int, kind: str = "normal"):
    x = operand(kind, m, k, seed=1, device="cuda")
    w = operand("positive" if kind == "positive" else "normal", n, k, seed=2, device="cuda")
    return *quantizer.group(x, None, False), *quantizer.block(w, None, True)


def run(config, a, a_scale, b, b_scale, bias=None, dtype=BF16, out=None, accumulate=False):
    if out is None:
        out = torch.full((a.shape[0], b.shape[0]), torch.nan, dtype=dtype, device="cuda")
    sm90.launch(a, a_scale, b, b_scale, bias, out, config, accumulate)
    return out


def check(out, a, a_scale, b, b_scale, bias=None, added=None):
    wide_bias = None if bias is None else bias.double()
    exact = reference.gemm(a, a_scale, b, b_scale, wide_bias)
    a_abs, b_abs = (t.float().abs().to(t.dtype) for t in (a, b))
    magnitude = reference.gemm(a_abs, a_scale, b_abs, b_scale, None if bias is None else wide_bias.abs())
    if added is not None:
        exact, magnitude = exact + added.double(), magnitude + added.double().abs()
    found = worst(out, exact, gemm_bound(exact, magnitude, a.shape[1], out.dtype, "fp8"))
    assert found.ratio <= 1, found


def families(problem: GemmProblem):
    return sm90_configs.candidates(problem)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 384, 1024), (13, 1216, 1152), (64, 576, 2048), (300, 1216, 1152)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_every_candidate_is_inside_the_bound_and_repeats_itself(m, n, k, dtype):
    given = operands(m, n, k)
    for config in families(GemmProblem(m, n, k, dtype)):
        out = run(config, *given, dtype=dtype)
        check(out, *given)
        assert torch.equal(out, run(config, *given, dtype=dtype)), config


@pytest.mark.parametrize(("m", "n", "k"), [(1, 384, 1024), (13, 1212, 1152), (64, 576, 2048), (300, 1216, 1152)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_scales_of_rows(m, n, k, dtype):
    """ROW, in every kind of configuration: nothing of a scale in the loop, all of it in what is written."""
    x, w = (operand("rows", rows, k, seed=rows, device="cuda") for rows in (m, n))
    given = *quantizer.token(x), *quantizer.token(w)
    bias = torch.linspace(-1, 1, n, device="cuda").to(BF16)
    exact = row_reference.gemm(*given, bias)
    a, b = (t.float().abs().to(t.dtype) for t in (given[0], given[2]))
    bound = gemm_bound(exact, row_reference.gemm(a, given[1], b, given[3], bias.abs()), k, dtype, "fp8")
    for config in families(GemmProblem(m, n, k, dtype, BF16)):
        config = replace(config, row=1)
        out = run(config, *given, bias, dtype)
        found = worst(out, exact, bound)
        assert found.ratio <= 1, (config, found)
        assert torch.equal(out, run(config, *given, bias, dtype)), config


def test_every_tuned_configuration_is_right():
    entries = table("gemm_fp8_block", "NVIDIA_H200")["sm90"].values()
    tuned = {sm90_configs.Config(**found) for by_m in entries for found in by_m.values()}
    # Long rings do not go round in so few blocks of K: once more with short ones.
    tuned |= {replace(config, stages=min(config.stages, 3)) for config in tuned if not config.unroll}
    given = {(m, k): operands(m, 1216, k) for m in (40, 300, 500) for k in (1152, 1536)}
    nvrtc.compile_all(sm90.source(config, BF16, None, False) for config in tuned)
    for config in tuned:
        operand_set = given[40 if config.swap else 500 if config.stream else 300, 1536 if config.unroll else 1152]
        check(run(config, *operand_set), *operand_set)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind):
    for m in (16, 256, 1000):
        given = operands(m, 1024, 4096, kind)
        check(run(sm90.config(GemmProblem(m, 1024, 4096)), *given), *given)


def test_many_tiles_for_each_cta():
    """More than one wave: persistent CTAs, the last wave in parts, accumulators and barriers used again."""
    given = operands(4096, 2304, 1024)
    problem = GemmProblem(4096, 2304, 1024)
    for config in families(problem):
        check(run(config, *given), *given)
    given = operands(16, 40_000, 512)
    for config in families(GemmProblem(16, 40_000, 512)):
        check(run(config, *given), *given)


@pytest.mark.parametrize(
    "changes",
    [
        {"temps": 2}, {"temps": 2, "by": 64}, {"by": 192, "stages": 5}, {"waves": 2, "stages": 4},
        {"math_groups": 1, "by": 192}, {"swap": 1, "by": 16, "math_groups": 1, "output_tma": 0},
        {"swap": 1, "by": 64, "output_tma": 0}, {"swap": 1, "stages": 4, "output_tma": 0}, {"temps": 2, "cluster_x": 2},
    ],
)  # fmt: skip
def test_tiles_cut_evenly_along_k(changes):
    """Of one, two, five and six tiles of tokens; less than a tile for each CTA, and more. Flags are put back."""
    config = sm90_configs.Config(**{"stream": 1} | changes)
    height = config.by if config.swap else config.bx
    shapes = (height - 3, 1216, 1152), (2 * height, 4096, 4096), (4 * height + 1, 9000, 1024), (height, 136, 128)
    shapes = (*shapes, (5 * height + 9, 2304, 2048))
    able = [shape for shape in shapes if sm90_configs.reject(config, GemmProblem(*shape)) is None]
    assert len(able) == (2 if config.cluster_x == 2 else 5)  # a cluster wants an even number of tiles of tokens
    for m, n, k in able:
        given = operands(m, n, k)
        out = run(config, *given)
        check(out, *given)
        assert torch.equal(out, run(config, *given))


@pytest.mark.parametrize("bias_dtype", [None, BF16, FP16, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_bias_and_accumulation(dtype, bias_dtype):
    for m, n in ((5, 264), (200, 520), (200, 516)):
        given = operands(m, n, 512)
        bias = None if bias_dtype is None else torch.linspace(-2, 2, n, device="cuda").to(bias_dtype)
        config = sm90.config(GemmProblem(m, n, 512, dtype, bias_dtype))
        check(run(config, *given, bias, dtype), *given, bias)
        if not config.output_tma:
            before = torch.randn(m, n, device="cuda").to(dtype)
            check(run(config, *given, bias, out=before.clone(), accumulate=True), *given, bias, before)


def test_strided_rows_and_a_misaligned_operand():
    a, a_scale, b, b_scale = operands(100, 512, 1024)
    wide = torch.zeros(100, 1040, dtype=torch.uint8, device="cuda").view(a.dtype)
    wide[:, :1024] = a
    out = torch.full((100, 1024), torch.nan, dtype=BF16, device="cuda")
    config = sm90_configs.default(GemmProblem(100, 512, 1024))
    run(config, wide[:, :1024], a_scale, b, b_scale, out=out[:, :512])
    check(out[:, :512], a, a_scale, b, b_scale)
    assert out[:, 512:].isnan().all()
    shifted = torch.zeros(a.numel() + 1, dtype=torch.uint8, device="cuda").view(a.dtype)[1:].view(a.shape).copy_(a)
    check(run(config, shifted, a_scale, b, b_scale), a, a_scale, b, b_scale)


def test_a_nan_stays_in_its_row():
    a, a_scale, b, b_scale = operands(256, 512, 1024)
    scale = empty_group_scale(a, 256, 8).copy_(a_scale)
    scale[7, 3] = torch.nan
    out = run(sm90.config(GemmProblem(256, 512, 1024)), a, scale, b, b_scale)
    assert out[7].isnan().all()
    assert not out[:7].isnan().any()
    assert not out[8:].isnan().any()


@pytest.mark.parametrize("tail", [1, 4])
def test_graphs_replay_on_fresh_data(tail):
    m, n, k = 300, 8192, 2048
    config = sm90_configs.Config(math_groups=3, stages=4, pieces=2, tail=tail)
    a, a_scale, b, b_scale = operands(m, n, k)
    out = run(config, a, a_scale, b, b_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            run(config, a, a_scale, b, b_scale, out=out)
    for seed in range(3):
        codes, scale = quantizer.group(operand("normal", m, k, seed=seed, device="cuda"), None, False)
        a.copy_(codes)
        a_scale.copy_(scale)
        out.fill_(torch.nan)
        graph.replay()
        check(out, a, a_scale, b, b_scale)


def test_the_first_launch_may_happen_inside_a_capture():
    config = sm90_configs.Config(temps=2, stages=3, group=5)  # one that nothing else uses
    given = operands(128, 256, 512)
    out = torch.full((128, 256), torch.nan, dtype=BF16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(config, *given, out=out)
    graph.replay()
    check(out, *given)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    ("m", "config"),
    [
        (16, sm90_configs.Config(by=16, math_groups=1, swap=1, output_tma=0, stages=4)),
        (64, sm90_configs.Config(by=64, swap=1, output_tma=0, stages=4, split=2)),
        (300, sm90_configs.Config(temps=2, tail=4)), (300, sm90_configs.Config(temps=2, stream=1)),
        (300, sm90_configs.Config(math_groups=3, stages=4, pieces=2, unroll=1)),
    ],
)  # fmt: skip
def test_activations_that_are_written_late(m, config, waits, late_results, without_wait, monkeypatch):
    """The kernel starts before its activations are there. One that does not wait for them shows that this can fail."""
    a, a_scale, b, b_scale = operands(m, 2048, 2048)
    expected = run(config, a, a_scale, b, b_scale)  # the weights are known from here on
    check(expected, a, a_scale, b, b_scale)

    monkeypatch.setattr(sm90, "_prepared", sm90._prepared.__wrapped__)  # which would remember the kernel
    if not waits:
        monkeypatch.setattr(sm90, "kernel", without_wait(sm90.source, "gemm_fp8_block"))
    run(config, a, a_scale, b, b_scale)  # its code is loaded
    found = late_results(lambda late, out: run(config, late, a_scale, b, b_scale, out=out), a, expected)
    assert all(found) if waits else not all(found)


def test_streams_and_threads_do_not_disturb_each_other():
    m, n, k = 300, 8192, 2048
    config = sm90_configs.Config(math_groups=3, stages=4, pieces=2, tail=4)
    given = operands(m, n, k)
    expected = run(config, *given)
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                results.append(run(config, *given))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(results) == 90
    assert all(torch.equal(result, expected) for result in results)


def test_the_kernels_keep_their_accumulators_in_registers():
    """A few registers around the loops may go to local memory, not an array."""
    for problem in (GemmProblem(m, 4096, 4096) for m in (1, 64, 256, 4096)):
        for config in families(problem):
            bytes_per_thread = ctypes.c_int()
            handle = sm90.kernel(config, BF16, None, False)._handle
            status = driver.driver().cuKernelGetAttribute(ctypes.byref(bytes_per_thread), 3, handle, 0)  # LOCAL_SIZE
            driver.check(status, "cuKernelGetAttribute")
            assert bytes_per_thread.value <= 64, config
