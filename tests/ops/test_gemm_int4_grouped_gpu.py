"""Grouped INT4 GEMM on a GPU: every backend inside the bound, whatever the counts; nothing read or written beside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantlab_kernels import gemm_int4_grouped, quantize_fp8_group, quantize_fp8_token, repack_int4
from quantlab_kernels.common import nvrtc
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.int4 import decode
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.gemm_int4_fp8 import sm90
from quantlab_kernels.gemm_int4_fp8.sm90_configs import Config, deepest, reject
from quantlab_kernels.gemm_int4_grouped import reference
from quantlab_kernels.gemm_int4_grouped.op import BACKENDS, problem_of
from quantlab_kernels.packing import pack_int4

pytestmark = pytest.mark.gpu(sm=80)
hopper = pytest.mark.gpu(sm=90)

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
COUNTS = {
    "few": [3, 0, 16, 1, 0, 7],
    "none": [0, 0, 0],
    "one of all": [0, 0, 40, 0],
    "ragged": [129, 0, 64, 63, 65, 1, 200, 128],
    "tall": [1500, 0, 1100, 700],
    "many": [i % 5 for i in range(300)],
}
QUANTIZERS = {"group": quantize_fp8_group, "token": quantize_fp8_token}
CONFIGS = (
    Config(2, 2, 16), Config(1, 2, 16), Config(1, 4, 16), Config(4, 1, 16), Config(2, 2, 32), Config(2, 1, 64),
    Config(4, 1, 64, prefetch=0), Config(4, 1, 32), Config(2, 2, 64, prefetch=0), Config(2, 1, 128),
    Config(3, 1, 128, prefetch=0), Config(2, 1, 128, prefetch=0),
)  # fmt: skip


def weights(experts, n, k, scale=BF16):
    generator = torch.Generator("cuda").manual_seed(5)
    codes = torch.randint(-7, 8, (experts * n, k), dtype=torch.int8, device="cuda", generator=generator)
    scales = torch.rand(experts * n, k // 128, device="cuda", generator=generator) + 0.01
    return pack_int4(codes).unflatten(0, (experts, n)), as_group_scale(scales.to(scale)).unflatten(0, (experts, n))


def operands(counts, n, k, activations, *, spare=0, kind="normal", tiled=True):
    """Rows that no expert owns hold NaN."""
    x = operand(kind, sum(counts) + spare, k, seed=1, device="cuda").to(BF16)
    a, a_scale = QUANTIZERS[activations](x) if activations in QUANTIZERS else (x, None)
    (a if a_scale is None else a_scale)[sum(counts) :] = torch.nan
    words, b_scale = weights(len(counts), n, k)
    bits = 16 if a_scale is None else 8
    b = repack_int4(words.flatten(0, 1), activation_bits=bits).unflatten(0, (len(counts), -1)) if tiled else words
    return a, a_scale, b, b_scale, torch.tensor(counts, device="cuda")


def through(backend, given, out, config=None):
    problem = problem_of(*given[:4], out.dtype)
    if (reason := BACKENDS.reason(backend, problem)) is not None:
        pytest.fail(reason)
    module = BACKENDS.module(backend)
    module.launch(*given, out, module.config(problem) if config is None else config)


def check(out, given, spare=0):
    a, a_scale = given[:2]
    rows = len(a) - spare
    exact = reference.gemm(*given)[:rows]
    magnitude = expected_magnitude(given)[:rows]
    if rows:
        accumulation = "float32" if a_scale is None else "fp8"
        found = worst(out[:rows], exact, gemm_bound(exact, magnitude, a.shape[1], out.dtype, accumulation))
        assert found.ratio <= 1, found
    assert out[rows:].isnan().all(), "a row that no expert owns was written"


def expected_magnitude(given):
    """|A| |B|^T of each row and its expert."""
    a, a_scale, b, b_scale, counts = given
    wide = a.double().abs()
    if a_scale is not None:
        wide = (wide.unflatten(1, (a_scale.shape[1], -1)) * a_scale.double()[:, :, None]).flatten(1)
    out, start = torch.zeros(len(a), b_scale.shape[1], dtype=torch.float64, device="cuda"), 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        out[rows] = wide[rows] @ decode(b[expert], b_scale[expert]).abs().t()
        start += count
    return out


def empty(given, dtype=BF16):
    return torch.full((len(given[0]), given[3].shape[1]), torch.nan, dtype=dtype, device="cuda")


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("activations", ["group", "token", "none"])
@pytest.mark.parametrize("backend", ["triton", pytest.param("sm90", marks=hopper)])
def test_whatever_the_counts(counts, activations, backend):
    given = operands(COUNTS[counts], 320, 384, activations, spare=3, tiled=backend == "sm90")
    for dtype in (BF16, FP32) if counts == "ragged" else (BF16,):
        outs = [empty(given, dtype) for _ in range(2)]
        for out in outs:
            through(backend, given, out)
        check(outs[0], given, 3)
        assert torch.equal(outs[0].nan_to_num(7), outs[1].nan_to_num(7))


@hopper
@pytest.mark.parametrize("activations", ["group", "none"])
def test_every_configuration_over_many_blocks_is_exact(activations):
    """Codes times -1, 0 and 1, scales of powers of two: every sum is an integer that float32 holds."""
    counts, n, k = [17, 0, 70, 1, 33], 384, 8192
    given = list(operands(counts, n, k, activations))
    generator = torch.Generator("cuda").manual_seed(9)
    values = torch.randint(-1, 2, given[0].shape, device="cuda", generator=generator).float()
    given[0] = values.to(given[0].dtype)
    if given[1] is not None:
        given[1].copy_(2.0 ** (torch.arange(given[1].numel(), device="cuda") % 2).view(given[1].shape))
    powers = 2.0 ** (torch.arange(given[3].numel(), device="cuda") % 3).view(given[3].shape)
    given[3].copy_(powers)
    exact, problem = reference.gemm(*given), problem_of(*given[:4], FP32)
    ways = [replace(shape, **way) for shape in CONFIGS for way in ({}, {"early": 1})]
    configs = [config for shape in ways if reject(config := deepest(shape, problem), problem) is None]
    nvrtc.compile_all(sm90.source(config, sm90.kind(problem)) for config in configs)
    for config in configs:
        for _ in range(2):
            out = empty(given, FP32)
            through("sm90", given, out, config)
            assert torch.equal(out.double(), exact), config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiled", [False, pytest.param(True, marks=hopper)])
def test_every_kind_of_data(kind, tiled):
    for counts in ([5, 9, 2, 0], [300, 20, 0, 140]):
        given = operands(counts, 512, 2048, "group", kind=kind, tiled=tiled)
        check(gemm_int4_grouped(*given), given)


@hopper
def test_more_tiles_than_processors():
    for counts, n in (([700, 650, 20, 0, 900, 3], 1280), ([16, 3, 20, 0, 9, 3], 9216)):
        given = operands(counts, n, 512, "group")
        check(gemm_int4_grouped(*given), given)


@hopper
def test_dtypes_of_scales_and_rows_that_fill_no_tile():
    for scale in (FP16, FP32):
        given = list(operands([5, 0, 21], 192, 256, "group"))
        given[3] = weights(3, 192, 256, scale)[1]
        check(gemm_int4_grouped(*given, out_dtype=FP16), given)
    words = operands([5, 0, 21], 200, 256, "group", tiled=False)  # no multiple of 64 rows: words, Triton
    check(gemm_int4_grouped(*words), words)


@pytest.mark.parametrize("tiled", [False, pytest.param(True, marks=hopper)])
def test_a_graph_follows_new_counts(tiled):
    given = operands([4, 4, 4, 4], 256, 512, "group", tiled=tiled)
    gemm_int4_grouped(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemm_int4_grouped(*given)
    for counts in ([4, 4, 4, 4], [16, 0, 0, 0], [0, 1, 15, 0]):
        given[4].copy_(torch.tensor(counts))
        out.fill_(torch.nan)
        graph.replay()
        check(out, given)


def test_compiled_whole():
    given = operands([4, 0, 9], 256, 512, "group", tiled=False)
    compiled = torch.compile(lambda *tensors: gemm_int4_grouped(*tensors) * 2, fullgraph=True)
    assert torch.equal(compiled(*given), gemm_int4_grouped(*given) * 2)
