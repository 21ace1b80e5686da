"""rmsnorm_quantize and swiglu_quantize against their float64 definitions, element by element."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantlab_kernels import quantize_fp8_group, rmsnorm_quantize, swiglu_quantize
from quantlab_kernels.qtensor import expand_blocks
from quantlab_kernels.rmsnorm_quantize import reference as rmsnorm_reference
from quantlab_kernels.swiglu_quantize import reference as swiglu_reference

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


def assert_quantizes(codes: torch.Tensor, scale: torch.Tensor, exact: torch.Tensor, slack: float) -> None:
    """Every element within half a step of E4M3 (2^-4 of its value, 2^-10 of the scale below the normal range)."""
    got = codes.double() * expand_blocks(scale.double(), (1, 128), codes.shape)
    bound = exact.abs() * (2.0**-4 + slack) + expand_blocks(scale.double(), (1, 128), codes.shape) * 2.0**-10
    worst = ((got - exact).abs() / bound.clamp_min(1e-300)).max()
    assert worst <= 1, f"worst element at {float(worst):.2f} of its bound"
    assert bool(torch.isfinite(scale).all())


def check_swiglu(gate_up: torch.Tensor) -> None:
    codes, scale = swiglu_quantize(gate_up)
    assert_quantizes(codes, scale, swiglu_reference.product(gate_up), slack=1e-4)
    assert scale.stride() == (1, -(-codes.shape[0] // 4) * 4) or codes.shape[0] == 1


def check_rmsnorm(x: torch.Tensor, weight: torch.Tensor, offset: float) -> None:
    out, codes, scale = rmsnorm_quantize(x, weight, 1e-6, offset=offset)
    exact = rmsnorm_reference.norm(x, weight, 1e-6, offset)
    bound = exact.abs() * (U_OUT[x.dtype] + 1e-6) + torch.finfo(x.dtype).smallest_normal
    assert bool(((out.double() - exact).abs() <= bound).all())
    expected_codes, expected_scale = quantize_fp8_group(out)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_swiglu(m: int, k: int, dtype: torch.dtype):
    check_swiglu(inputs(m, 2 * k, dtype, torch.device("cpu")))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_rmsnorm(m: int, k: int, dtype: torch.dtype, offset: float):
    weight = torch.linspace(-0.5, 1.5, k).to(dtype)
    check_rmsnorm(inputs(m, k, dtype, torch.device("cpu")), weight, offset)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), [*SHAPES, (1000, 14336), (4, 16384)])
def test_producers_on_the_gpu(m: int, k: int, dtype: torch.dtype, strided: bool):
    device = torch.device("cuda")
    wide = inputs(m, 2 * k + 64, dtype, device)
    gate_up = wide[:, : 2 * k] if strided else wide[:, : 2 * k].contiguous()
    check_swiglu(gate_up)
    weight = torch.linspace(-0.5, 1.5, k).to(device, dtype)
    for offset in (0.0, 1.0):
        check_rmsnorm(gate_up[:, :k], weight, offset)
    first, second = swiglu_quantize(gate_up), swiglu_quantize(gate_up)
    assert torch.equal(first[0].view(torch.uint8), second[0].view(torch.uint8))
    assert torch.equal(first[1], second[1])


INTERPRETED = """
import sys, torch
sys.path[:0] = {paths!r}
import importlib
rms = importlib.import_module("quantlab_kernels.rmsnorm_quantize.op")
swi = importlib.import_module("quantlab_kernels.swiglu_quantize.op")
from quantlab_kernels.rmsnorm_quantize import triton as rms_triton
from quantlab_kernels.swiglu_quantize import triton as swi_triton
import test_producers as t
def swiglu(gate_up):
    codes, scale = swi._fake(gate_up)
    problem = swi.Problem(*codes.shape, gate_up.dtype, 80)
    swi_triton.launch(problem, gate_up, codes, scale, swi_triton.config(problem))
    return codes, scale
def rmsnorm(x, weight, eps, *, offset):
    outs = rms._fake(x, weight, eps, offset)
    problem = rms.Problem(*x.shape, x.dtype, 80)
    rms_triton.launch(problem, x, weight, eps, offset, *outs, rms_triton.config(problem))
    return outs
t.swiglu_quantize, t.rmsnorm_quantize = swiglu, rmsnorm
for m, k in [(1, 128), (3, 256), (5, 200), (9, 384)]:
    x = t.inputs(m, 2 * k, torch.float32, torch.device("cpu"))
    t.check_swiglu(x)
    for offset in (0.0, 1.0):
        t.check_rmsnorm(x[:, :k], torch.linspace(-0.5, 1.5, k), offset)
"""


def test_triton_logic_in_the_interpreter():
    pytest.importorskip("triton")
    here = Path(__file__)
    paths = [str(here.parent), *(str(here.parents[2] / p) for p in ("", "kernels", "calib"))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED.format(paths=paths)], check=True, env=environment)


@pytest.mark.parametrize("op", ["swiglu", "rmsnorm"])
def test_traces_and_refuses(op: str):
    x, weight = torch.randn(3, 256, dtype=torch.bfloat16), torch.ones(256)
    if op == "swiglu":
        torch.library.opcheck(torch.ops.quantlab.swiglu_quantize.default, (x,), test_utils="test_faketensor")
        with pytest.raises(RuntimeError, match=r"needs \[M, 2 I\]"):
            swiglu_quantize(x[:, :255])
        with pytest.raises(RuntimeError, match="needs bfloat16, float16 or float32"):
            swiglu_quantize(x.double())
    else:
        arguments = (x, weight, 1e-6, 0.0)
        torch.library.opcheck(torch.ops.quantlab.rmsnorm_quantize.default, arguments, test_utils="test_faketensor")
        with pytest.raises(RuntimeError, match=r"weight torch.float32 \(255,\)"):
            rmsnorm_quantize(x, weight[:255], 1e-6)


def test_no_rows():
    assert swiglu_quantize(torch.empty(0, 256))[0].shape == (0, 128)
    assert rmsnorm_quantize(torch.empty(0, 128), torch.ones(128), 1e-6)[2].shape == (0, 1)
