"""The quantize_fp8 ops on a CPU: layout, refusals, tracing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantlab_kernels import quantize_fp8_block, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.formats import E4M3
from quantlab_kernels.qtensor import TensorSpec, quantize
from quantlab_kernels.quantize_fp8 import op
from quantlab_kernels.quantize_fp8.configs import Config, candidates, default, reject

OPS = {"group": quantize_fp8_group, "token": quantize_fp8_token, "block": quantize_fp8_block}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_those_of_the_definition(kind: str, dtype: torch.dtype):
    x = operand(kind, 37, 300).to(dtype)
    for found, spec in (
        (quantize_fp8_group(x), TensorSpec(E4M3, (1, 128))),
        (quantize_fp8_group(x, power2=True), TensorSpec(E4M3, (1, 128), scale="power2")),
        (quantize_fp8_token(x), TensorSpec(E4M3, (1, -1))),
        (quantize_fp8_block(x), TensorSpec(E4M3, (128, 128), scale="power2")),
        (quantize_fp8_block(x, power2=False), TensorSpec(E4M3, (128, 128))),
    ):
        expected = quantize(x, spec)
        assert torch.equal(found[0].view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(found[1], expected.scale)


@pytest.mark.parametrize("m", [0, 1, 3, 4, 37])
def test_group_scales_are_column_major_and_padded(m: int):
    codes, scale = quantize_fp8_group(torch.randn(m, 300))
    assert codes.shape == (m, 300)
    assert codes.is_contiguous()
    assert scale.shape == (m, 3)
    assert m == 0 or scale.stride() == (1, -(-m // 4) * 4)


def test_given_scales_are_used_and_codes_saturate():
    x = torch.full((2, 256), 1000.0)
    codes, scale = quantize_fp8_group(x, scale=torch.tensor([1.0, 2.0]))
    assert scale.tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert (codes.float() == torch.tensor([448.0]).expand(2, 256)).all()
    codes, scale = quantize_fp8_block(x / 10, scale=torch.tensor([[1.0, 2.0]]))
    assert codes.float()[0, [0, 200]].tolist() == [96.0, 48.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_fp8_group(torch.zeros(3)), r"quantize_fp8_group: got shape \(3,\), needs two dimensions"),
        (lambda: quantize_fp8_token(torch.zeros(2, 3, dtype=torch.int32)), "got torch.int32, needs bfloat16"),
        (
            lambda: quantize_fp8_group(torch.zeros(2, 300), scale=torch.ones(2)),
            r"scale \(2,\) does not fit, needs \(2, 3\)",
        ),
        (lambda: quantize_fp8_block(torch.zeros(2, 300), scale=torch.ones(3)), r"does not fit, needs \(1, 3\)"),
        (lambda: quantize_fp8_block(torch.zeros(2, 3), scale=torch.ones(1, 1).half()), "float16, needs float32"),
    ],
)
def test_refusals_say_what_is_needed(call, message: str):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("granularity", OPS)
@pytest.mark.parametrize("shape", [(5, 300), (1, 128), (0, 256)])
def test_fake_results_have_the_layout_of_real_ones(granularity: str, shape):
    x = torch.randn(shape, dtype=torch.bfloat16)
    real = OPS[granularity](x)
    with FakeTensorMode() as mode:
        fake = OPS[granularity](mode.from_tensor(x))
    for r, f in zip(real, fake, strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("granularity", OPS)
def test_operator_registration(granularity: str):
    overload = getattr(torch.ops.quantlab, f"quantize_fp8_{granularity}").default
    arguments = {"group": (None, False), "token": (), "block": (None, True)}[granularity]
    # test_schema compares results with `mul`, which torch does not have for FP8.
    checks = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(overload, (torch.randn(5, 300), *arguments), test_utils=checks)


def test_traces_whole_with_dynamic_rows():
    compiled = torch.compile(lambda x: quantize_fp8_group(x * 2), fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (4, 7):
        x = torch.randn(m, 256)
        assert torch.equal(compiled(x)[1], quantize_fp8_group(x * 2)[1])


def test_cpus_need_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, quantlab_kernels as q;"
        "x = torch.randn(4, 256); q.gemm_fp8_block(*q.quantize_fp8_group(x), *q.quantize_fp8_block(x));"
        "q.gemm_fp8_row(*q.quantize_fp8_token(x), *q.quantize_fp8_token(x)); assert not torch.cuda.is_initialized()"
    )
    search = str(Path(__file__).parents[2] / "kernels")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": search})


@pytest.mark.parametrize("granularity", OPS)
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (16, 896), (4096, 14336), (3, 1)])
def test_configurations_are_legal(granularity: str, m: int, k: int):
    problem = op.Problem(granularity, m, k)
    assert reject(default(problem), problem) is None
    assert list(candidates(problem))
    assert "groups of 128" in (reject(Config(8, 64, 1), op.Problem("group", m, k)) or "")
    assert "128x128" in (reject(Config(8, 64, 1), op.Problem("block", m, k)) or "")
    assert "powers of two" in (reject(Config(3, 128, 1), problem) or "")
