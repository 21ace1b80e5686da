"""INT4 weights in the Hopper kernel for few tokens: every kind of configuration, both kinds of token scales."""

from __future__ import annotations

import pytest
import torch

from quantlab_kernels import quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common import nvrtc
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.int4 import Int4Problem, decode, repack_int4
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.gemm_fp8_block import sm90_few as kernel
from quantlab_kernels.gemm_int4_fp8 import sm90_few
from quantlab_kernels.packing import pack_int4

pytestmark = pytest.mark.gpu(sm=90)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def weight(n: int, k: int, scale: torch.dtype = BF16):
    """Tiles and scales that span three orders of magnitude."""
    codes = torch.randint(-7, 8, (n, k), dtype=torch.int8, device="cuda")
    spread = torch.rand(n, k // 128, device="cuda") + 0.01
    scales = spread * torch.logspace(-3, 0, n, device="cuda")[:, None]
    return repack_int4(pack_int4(codes), activation_bits=8), as_group_scale(scales.to(scale))


def activations(kind: str, m: int, k: int, grouped: bool):
    values = operand(kind, m, k, seed=1, device="cuda").to(BF16)
    return (quantize_fp8_group if grouped else quantize_fp8_token)(values)


def run(config, a, a_scale, tiles, b_scale, bias=None, dtype=BF16):
    out = torch.full((a.shape[0], b_scale.shape[0]), torch.nan, dtype=dtype, device="cuda")
    sm90_few.launch(a, a_scale, tiles, b_scale, bias, out, config)
    return out


def check(out, a, a_scale, tiles, b_scale, bias=None):
    w = decode(tiles, b_scale)
    x = (a.double().unflatten(1, (a_scale.shape[1], -1)) * a_scale.double()[:, :, None]).flatten(1)
    exact, magnitude = x @ w.t(), x.abs() @ w.abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    found = worst(out, exact, gemm_bound(exact, magnitude, a.shape[1], out.dtype, "fp8"))
    assert found.ratio <= 1, found


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 384, 1024), (8, 200, 128), (13, 1217, 1152), (5, 72, 7168)])
def test_every_candidate_is_inside_the_bound_and_repeats_itself(m, n, k, grouped):
    given = *activations("outliers", m, k, grouped), *weight(n, k)
    tried = sm90_few.candidates(Int4Problem(m, n, k, grouped=grouped))
    nvrtc.compile_all([kernel.source(config, BF16, None, BF16) for config in tried], workers=8)
    for config in tried:
        out = run(config, *given)
        check(out, *given)
        assert torch.equal(out, run(config, *given)), config


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind):
    given = *activations(kind, 7, 2048, grouped=True), *weight(896, 2048)
    check(run(sm90_few.config(Int4Problem(7, 896, 2048, grouped=True)), *given), *given)


@pytest.mark.parametrize("scale", [BF16, FP16, FP32])
def test_dtypes_of_scales_outputs_and_biases(scale):
    given = *activations("normal", 4, 512, grouped=False), *weight(264, 512, scale)
    bias = torch.linspace(-2, 2, 264, device="cuda")
    config = sm90_few.config(Int4Problem(4, 264, 512))
    for dtype, bias_dtype in ((BF16, FP16), (FP16, FP32), (FP32, BF16)):
        cast = bias.to(bias_dtype)
        check(run(config, *given, cast, dtype), *given, cast)
