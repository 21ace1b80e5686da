"""swiglu_quantize against its float64 definition, element by element."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantlab_kernels import swiglu_quantize
from quantlab_kernels.qtensor import expand_blocks
from quantlab_kernels.swiglu_quantize import reference

SHAPES = [(1, 128), (3, 256), (17, 384), (5, 200), (64, 4096)]


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
    each = expand_blocks(scale.double(), (1, 128 if scale.shape[1] > 1 else codes.shape[1]), codes.shape)
    bound = exact.abs() * (2.0**-4 + slack) + each * 2.0**-10
    worst = ((codes.double() * each - exact).abs() / bound.clamp_min(1e-300)).max()
    assert worst <= 1, f"worst element at {float(worst):.2f} of its bound"
    assert bool(torch.isfinite(scale).all())


def check(gate_up: torch.Tensor) -> None:
    exact = reference.product(gate_up)
    codes, scale = swiglu_quantize(gate_up)
    assert_quantizes(codes, scale, exact, slack=1e-4)
    assert scale.stride() == (1, -(-codes.shape[0] // 4) * 4) or codes.shape[0] == 1
    codes, scale = swiglu_quantize(gate_up, group=False)
    assert scale.shape == (len(codes), 1)
    assert_quantizes(codes, scale, exact, slack=1e-4)
    largest = exact.abs().amax(1, keepdim=True)
    assert torch.allclose(scale.double(), torch.where(largest == 0, 1.0, largest / 448), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_on_the_cpu(m: int, k: int, dtype: torch.dtype):
    check(inputs(m, 2 * k, dtype, torch.device("cpu")))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), [*SHAPES, (1000, 14336), (9, 18944)])
def test_on_the_gpu(m: int, k: int, dtype: torch.dtype, strided: bool):
    wide = inputs(m, 2 * k + 64, dtype, torch.device("cuda"))
    gate_up = wide[:, : 2 * k] if strided else wide[:, : 2 * k].contiguous()
    check(gate_up)
    for group in (True, False):
        first, second = swiglu_quantize(gate_up, group=group), swiglu_quantize(gate_up, group=group)
        assert torch.equal(first[0].view(torch.uint8), second[0].view(torch.uint8))
        assert torch.equal(first[1], second[1])


INTERPRETED = """
import importlib, torch
op = importlib.import_module("quantlab_kernels.swiglu_quantize.op")
from quantlab_kernels.swiglu_quantize import triton
import test_swiglu_quantize as tests
from test_triton_interpreted import apart
def swiglu(gate_up, *, group=True):
    codes, scale = op._fake(gate_up, group)
    problem = op.Problem(*codes.shape, gate_up.dtype, group, 80)
    triton.launch(problem, gate_up, codes, scale, triton.config(problem))
    return codes, scale
tests.swiglu_quantize = swiglu
triton.LONGEST_ROW = 256  # longer rows are read twice
for m, k in [(1, 128), (3, 256), (5, 200), (9, 384)]:
    tests.check(tests.inputs(m, 2 * k, torch.float32, torch.device("cpu")))
for k in (200, 384):
    tests.check(apart(tests.inputs(2, 2 * k, torch.float16, torch.device("cpu")), k))
"""


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED)


def test_traces_and_refuses():
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    for group in (True, False):
        torch.library.opcheck(torch.ops.quantlab.swiglu_quantize.default, (x, group), test_utils="test_faketensor")
    with pytest.raises(RuntimeError, match=r"needs \[M, 2 I\]"):
        swiglu_quantize(x[:, :255])
    with pytest.raises(RuntimeError, match="needs bfloat16, float16 or float32"):
        swiglu_quantize(x.double())


def test_no_rows():
    assert swiglu_quantize(torch.empty(0, 256))[0].shape == (0, 128)
    assert swiglu_quantize(torch.empty(0, 256), group=False)[1].shape == (0, 1)
