"""quantize_fp8 on a GPU: codes and scales equal the definition bit for bit."""

from __future__ import annotations

import pytest
import torch

from quantlab_kernels import quantize_fp8_block, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.quantize_fp8 import op, reference
from quantlab_kernels.quantize_fp8.configs import Config, reject

pytestmark = pytest.mark.gpu(sm=80)

SHAPES = [(1, 4096), (3, 128), (37, 300), (128, 7168), (1000, 1536), (5, 40000), (2, 1)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def definition(granularity: str, x, given=None, power2=False):
    """What the CPU makes of it: GPUs have to write the same bytes."""
    given = None if given is None else given.cpu()
    if granularity == "token":
        return reference.token(x.cpu())
    return getattr(reference, granularity)(x.cpu(), given, power2)


def same(found, expected) -> bool:
    """Equal bits and layout; of NaN, that both are."""
    strides = found[1].stride() == expected[1].stride()
    codes, scale = (t.cpu() for t in found)
    expected = tuple(t.cpu() for t in expected)
    equal = codes.view(torch.uint8) == expected[0].view(torch.uint8)
    both_nan = codes.float().isnan() & expected[0].float().isnan()
    scales = (scale == expected[1]) | (scale.isnan() & expected[1].isnan())
    return bool((equal | both_nan).all()) and bool(scales.all()) and strides


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_definition(dtype: torch.dtype, kind: str):
    for rows, columns in SHAPES:
        x = operand(kind, rows, columns, device="cuda").to(dtype)
        for power2 in (False, True):
            assert same(quantize_fp8_group(x, power2=power2), definition("group", x, None, power2)), (rows, columns)
            assert same(quantize_fp8_block(x, power2=power2), definition("block", x, None, power2)), (rows, columns)
        assert same(quantize_fp8_token(x), definition("token", x)), (rows, columns)


def test_every_float16_value_with_every_kind_of_scale():
    """All 65536 float16 patterns, NaN and Inf among them, divided by awkward scales: division must round correctly."""
    x = torch.arange(65536, dtype=torch.int32, device="cuda").to(torch.uint16).view(torch.float16).view(512, 128)
    for factor in (1.0, 1 / 3, 0.0123, 3e-39, 7e4, 3.4e38, 2.0**-126, float("inf")):
        scale = torch.full((512, 1), factor, device="cuda")
        assert same(quantize_fp8_group(x, scale=scale), definition("group", x, scale, False)), factor
    assert same(quantize_fp8_group(x), definition("group", x, None, False))
    assert same(quantize_fp8_token(x), definition("token", x))
    assert same(quantize_fp8_block(x), definition("block", x, None, True))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_every_short_quotient(dtype: torch.dtype, bits: int):
    """Every mantissa over the scale of every mantissa, 20 binades deep: the two-term reciprocal loses no code.

    Binades only shift the quotient, so a few places for amax stand for all, the ends of bfloat16's range among them.
    """
    mantissa = 1 + torch.arange(2**bits, dtype=torch.float64) / 2**bits
    x = (mantissa * 2.0 ** torch.arange(-20, 1).double()[:, None]).flatten()
    x = torch.cat([x, x.new_zeros(-len(x) % 127)]).view(1, -1, 127)
    x = torch.where(x <= mantissa[:, None, None], x, -x / 2)
    x = torch.cat([mantissa[:, None, None].expand(-1, x.shape[1], 1), x], dim=2).flatten(0, 1)
    for binade in (0, 100, -100) if dtype == torch.bfloat16 else (0,):
        rows = (x * 2.0**binade).to(dtype).cuda()
        assert same(quantize_fp8_group(rows), definition("group", rows)), binade


def test_given_scales_saturate():
    x = operand("outliers", 65, 512, device="cuda")
    scale = torch.rand(65, 4, device="cuda") / 100
    for given in (scale, scale[0], scale.t().contiguous().t()):
        found = quantize_fp8_group(x, scale=given)
        assert same(found, definition("group", x, given, False))
        assert found[0].float().abs().max() == 448
    assert same(quantize_fp8_block(x, scale=scale[:1]), definition("block", x, scale[:1], True))


def test_strided_input():
    x = operand("rows", 300, 257, device="cuda").to(torch.bfloat16)
    for view in (x.t(), x[::2], x[:, 3:200], x[:, ::2]):
        assert same(quantize_fp8_group(view), definition("group", view.contiguous(), None, False))
        assert same(quantize_fp8_token(view), definition("token", view.contiguous()))
        assert same(quantize_fp8_block(view), definition("block", view.contiguous(), None, True))


CONFIGS = {  # the smallest and largest tiles and programs that a sweep tries, each compiled
    "group": [Config(1, 128, 1), Config(1, 1024, 1), Config(8, 512, 4), Config(64, 128, 8), Config(32, 1024, 8)],
    "token": [Config(1, 2048, 4), Config(4, 2048, 32), Config(2, 128, 1)],
    "block": [Config(128, 128, 4), Config(128, 128, 8), Config(128, 128, 16)],
}


@pytest.mark.parametrize("granularity", CONFIGS)
def test_every_tile_writes_every_element_and_nothing_else(granularity: str):
    x = operand("outliers", 130, 1100, device="cuda").to(torch.bfloat16)
    problem = op.Problem(granularity, 130, 1100, sm=op.gpu_of(x).sm)
    expected = definition(granularity, x)
    backend = op.BACKENDS.module("triton")
    for config in CONFIGS[granularity]:
        assert reject(config, problem) is None
        codes, scale = op._empty(granularity, x)
        border = torch.full((codes.numel() + 2048,), 0x55, dtype=torch.uint8, device="cuda")
        codes = border[1024:-1024].view(torch.float8_e4m3fn).view(codes.shape)
        scale.fill_(torch.nan)
        backend.launch(problem, x, None, codes, scale, config)
        assert same((codes, scale), expected), config
        assert (torch.cat([border[:1024], border[-1024:]]) == 0x55).all(), config


def test_the_op_is_captured_in_a_graph():
    x = operand("normal", 64, 512, device="cuda").to(torch.bfloat16)
    expected = quantize_fp8_group(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = quantize_fp8_group(x)
    found[0].view(torch.uint8).fill_(0x55)
    graph.replay()
    assert same(found, expected)


def test_software_cast_of_old_gpus_equals_the_hardware():
    """The integer path for GPUs before sm_89, compiled here."""
    x = operand("outliers", 64, 512, device="cuda")
    x[3, 5] = float("nan")
    backend = op.BACKENDS.module("triton")
    for granularity in ("group", "token", "block"):
        problem = op.Problem(granularity, 64, 512, torch.float32, sm=80)
        codes, scale = op._empty(granularity, x)
        backend.launch(problem, x, None, codes, scale, backend.config(problem))
        expected = definition(granularity, x)
        assert same((codes, scale), expected)


@pytest.mark.parametrize("granularity", ["group", "token", "block"])
def test_the_definition_gives_the_same_bytes_on_gpu_and_cpu(granularity: str):
    x = operand("rows", 300, 1000, device="cuda")
    on_gpu = reference.token(x) if granularity == "token" else getattr(reference, granularity)(x, None, False)
    assert same(on_gpu, definition(granularity, x))
