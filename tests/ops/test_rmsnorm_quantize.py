"""rmsnorm_quantize against its float64 definition, element by element."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantlab_kernels import quantize_fp8_group, quantize_fp8_token, rmsnorm, rmsnorm_quantize
from quantlab_kernels.rmsnorm_quantize import reference

SHAPES = [(1, 128), (3, 256), (17, 384), (5, 200), (64, 4096)]
U_OUT = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def inputs(m: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of very different magnitude, outliers, a zero row where there are rows enough."""
    generator = torch.Generator().manual_seed(m * 1000 + k)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-3, 1, m).unsqueeze(1)
    x[:, k // 3] *= 50
    if m > 2:
        x[1] = 0
    return x.to(device, dtype)


def check(x: torch.Tensor, weight: torch.Tensor, offset: float) -> None:
    exact = reference.norm(x, weight, 1e-6, offset)
    bound = exact.abs() * (U_OUT[x.dtype] + 1e-6) + torch.finfo(x.dtype).smallest_normal
    for group, quantize in ((True, quantize_fp8_group), (False, quantize_fp8_token)):
        out, codes, scale = rmsnorm_quantize(x, weight, 1e-6, offset=offset, group=group)
        assert bool(((out.double() - exact).abs() <= bound).all())
        expected_codes, expected_scale = quantize(out)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_on_the_cpu(m: int, k: int, dtype: torch.dtype, offset: float):
    check(inputs(m, k, dtype, torch.device("cpu")), torch.linspace(-0.5, 1.5, k).to(dtype), offset)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), [*SHAPES, (1000, 7168), (4, 16384)])
def test_on_the_gpu(m: int, k: int, dtype: torch.dtype, strided: bool):
    wide = inputs(m, k + 64, dtype, torch.device("cuda"))
    x = wide[:, :k] if strided else wide[:, :k].contiguous()
    weight = torch.linspace(-0.5, 1.5, k).to("cuda", dtype)
    for offset in (0.0, 1.0):
        check(x, weight, offset)


def check_plain(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Rows of heads that lie among others', and plain rows."""
    for offset in (0.0, 1.0):
        exact = reference.norm(x, weight, 1e-6, offset)
        bound = exact.abs() * (U_OUT[x.dtype] + 1e-6) + torch.finfo(x.dtype).smallest_normal
        out = rmsnorm(x, weight, 1e-6, offset=offset)
        assert out.is_contiguous()
        assert bool(((out.double() - exact).abs() <= bound).all())


def heads(batch: int, tokens: int, count: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    rows = inputs(batch * tokens, (count + 2) * k, dtype, torch.device(device))
    return rows.view(batch, tokens, count + 2, k)[:, :, 1:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_alone(dtype: torch.dtype):
    check_plain(heads(2, 5, 3, 64, dtype, "cpu"), torch.linspace(-0.5, 1.5, 64).to(dtype))
    with pytest.raises(RuntimeError, match="needs"):
        rmsnorm(torch.ones(2, 3, 8), torch.ones(4), 1e-6)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 32, 128), (3, 700, 5, 96), (2, 9, 1, 4096), (1, 2, 3, 16384)])
def test_the_norm_alone_on_the_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype):
    weight = torch.linspace(-0.5, 1.5, shape[-1]).to("cuda", dtype)
    x = heads(*shape, dtype, "cuda")
    check_plain(x, weight)
    check_plain(x[0, :, 0].contiguous(), weight)


INTERPRETED = """
import importlib, torch
op = importlib.import_module("quantlab_kernels.rmsnorm_quantize.op")
from quantlab_kernels.rmsnorm_quantize import triton
import test_rmsnorm_quantize as tests
from test_triton_interpreted import apart
def rmsnorm(x, weight, eps, *, offset, group):
    outs = op._fake(x, weight, eps, offset, group)
    problem = op.Problem(*x.shape, x.dtype, group, 80)
    triton.launch(problem, x, weight, eps, offset, *outs, triton.config(problem))
    return outs
def plain(x, weight, eps, *, offset):
    out = torch.empty(x.shape, dtype=x.dtype)
    rows = x.reshape(-1, *x.shape[-2:])
    problem = op.Problem(len(rows) * rows.shape[1], x.shape[-1], x.dtype, False, 80)
    triton.launch_plain(problem, rows, weight, eps, offset, out)
    return out
tests.rmsnorm_quantize, tests.rmsnorm = rmsnorm, plain
tests.check_plain(tests.heads(2, 5, 3, 96, torch.float16, "cpu"), torch.linspace(-0.5, 1.5, 96).half())
for m, k in [(1, 128), (3, 256), (5, 200), (9, 384)]:
    for offset in (0.0, 1.0):
        tests.check(tests.inputs(m, k, torch.float32, torch.device("cpu")), torch.linspace(-0.5, 1.5, k), offset)
x, weight = tests.inputs(2, 200, torch.float16, torch.device("cpu")), torch.linspace(-0.5, 1.5, 200).half()
tests.check(apart(x, 200), weight, 0.0)
tests.check_plain(apart(x[None], 200), weight)
"""


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED)


def test_traces_and_refuses():
    x, weight = torch.randn(3, 256, dtype=torch.bfloat16), torch.ones(256)
    op = torch.ops.quantlab.rmsnorm_quantize.default
    for group in (True, False):
        torch.library.opcheck(op, (x, weight, 1e-6, 0.0, group), test_utils="test_faketensor")
    with pytest.raises(RuntimeError, match=r"weight torch.float32 \(255,\)"):
        rmsnorm_quantize(x, weight[:255], 1e-6)


def test_no_rows():
    for group, scales in ((True, 2), (False, 1)):
        assert rmsnorm_quantize(torch.empty(0, 256), torch.ones(256), 1e-6, group=group)[2].shape == (0, scales)
