"""Both FP8 GEMM ops on a CPU: error bound, refusals, tracing, configurations."""

from __future__ import annotations

import pytest
import torch

from quantlab_kernels import (
    gemm_fp8_block,
    gemm_fp8_row,
    quantize_fp8_block,
    quantize_fp8_group,
    quantize_fp8_token,
)
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import GemmProblem, as_group_scale, is_group_scale
from quantlab_kernels.common.gemm_configs import Config, candidates, default, reject
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.gemm_fp8_block import reference as block_reference
from quantlab_kernels.gemm_fp8_block import scaled_mm as block_scaled_mm
from quantlab_kernels.gemm_fp8_row import reference as row_reference
from quantlab_kernels.gemm_fp8_row import scaled_mm as row_scaled_mm

OPS = {"block": gemm_fp8_block, "row": gemm_fp8_row}
REFERENCES = {"block": block_reference, "row": row_reference}


def operands(room: str, kind: str = "normal", m: int = 5, n: int = 200, k: int = 300):
    x, w = operand(kind, m, k, seed=1), operand("normal", n, k, seed=2)
    if room == "block":
        return *quantize_fp8_group(x), *quantize_fp8_block(w)
    return *quantize_fp8_token(x), *quantize_fp8_token(w)


@pytest.mark.parametrize("room", OPS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_inside_the_bound(room: str, kind: str):
    for m, n, k in ((1, 128, 128), (17, 200, 300), (9, 64, 4096)):
        a, a_scale, b, b_scale = operands(room, kind, m, n, k)
        positive = [t.float().abs().to(t.dtype) for t in (a, b)]
        for out_dtype, bias in ((torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.randn(n))):
            out = OPS[room](a, a_scale, b, b_scale, bias, out_dtype=out_dtype)
            exact = REFERENCES[room].gemm(a, a_scale, b, b_scale, bias)
            magnitude = REFERENCES[room].gemm(
                positive[0], a_scale, positive[1], b_scale, None if bias is None else bias.abs()
            )
            found = worst(out, exact, gemm_bound(exact, magnitude, k, out_dtype, "float32"))
            assert found.ratio <= 1, found


def test_the_reference_is_the_product_of_the_dequantized_operands():
    a, a_scale, b, b_scale = operands("block", k=256, n=256)
    wide_a = a.double() * a_scale.double().repeat_interleave(128, 1)
    wide_b = b.double() * b_scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(block_reference.gemm(a, a_scale, b, b_scale, None), wide_a @ wide_b.t())


@pytest.mark.parametrize("room", OPS)
def test_empty_batch(room: str):
    a, a_scale, b, b_scale = operands(room)
    assert OPS[room](a[:0], a_scale[:0], b, b_scale).shape == (0, 200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": lambda t: t.float()}, "a is torch.float32"),
        ({"a": lambda t: t[:, :-1]}, r"a \(5, 299\) and b \(200, 300\) do not match"),
        ({"a_scale": lambda t: t[:-1]}, r"a_scale is torch.float32 \(4, "),
        ({"b_scale": lambda t: t.half()}, "b_scale is torch.float16"),
        ({"bias": lambda t: torch.ones(3)}, r"bias is torch.float32 \(3,\), needs floats of shape \(200,\)"),
        ({"out_dtype": lambda t: torch.int8}, "out_dtype torch.int8, needs one of"),
    ],
)
@pytest.mark.parametrize("room", OPS)
def test_refusals_name_what_disagrees(room: str, change, message: str):
    names = ("a", "a_scale", "b", "b_scale")
    arguments = dict(zip(names, operands(room), strict=True)) | {"bias": None, "out_dtype": torch.bfloat16}
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(RuntimeError, match=f"gemm_fp8_{room}: {message}"):
        OPS[room](**arguments)


@pytest.mark.parametrize("room", OPS)
def test_operator_registration(room: str):
    overload = getattr(torch.ops.quantlab, f"gemm_fp8_{room}").default
    # test_schema compares results with `mul`, which torch does not have for FP8.
    checks = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(overload, (*operands(room), torch.randn(200), torch.bfloat16), test_utils=checks)


@pytest.mark.parametrize("room", OPS)
def test_traces_whole_with_its_quantization(room: str):
    _, _, b, b_scale = operands(room)
    quantizer = quantize_fp8_group if room == "block" else quantize_fp8_token
    function = lambda x: OPS[room](*quantizer(x), b, b_scale, out_dtype=torch.float32)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 8):
        x = torch.randn(m, 300)
        assert torch.equal(compiled(x), function(x))


def test_group_scales_are_copied_only_when_their_layout_differs():
    _, scale = quantize_fp8_group(torch.randn(6, 512))
    assert as_group_scale(scale) is scale
    row_major = scale.contiguous()
    assert not is_group_scale(row_major)
    assert is_group_scale(as_group_scale(row_major))
    assert torch.equal(as_group_scale(row_major), scale)


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 121])
@pytest.mark.parametrize("m", [1, 17, 64, 256, 4096])
def test_configurations_are_legal(m: int, sm: int):
    for n, k in ((4096, 7168), (200, 128), (28672, 4096)):
        problem = GemmProblem(m, n, k, sm=sm)
        assert reject(default(problem), problem) is None
        assert list(candidates(problem))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(48, 64), "powers of two"),
        (Config(8, 64), "below 16"),
        (Config(128, 128, 4, 8), "shared memory"),
        (Config(256, 128, 4, 2), "spill"),
        (Config(16, 64, split_k=8), "fewer steps"),
    ],
)
def test_illegal_configurations_have_a_reason(config: Config, reason: str):
    assert reason in (reject(config, GemmProblem(16, 256, 512)) or "")


@pytest.mark.parametrize(
    ("problem", "block_reason", "row_reason"),
    [
        (GemmProblem(256, 512, 512), None, None),
        (GemmProblem(256, 512, 512, sm=100), "sm_90 only", None),
        (GemmProblem(256, 512, 512, sm=89), "sm_90 only", "sm_90 or newer"),
        (GemmProblem(255, 512, 512), "multiples of 4", None),
        (GemmProblem(256, 200, 512), "N in multiples of 16", "multiples of 16"),
        (GemmProblem(256, 512, 512, torch.float16, torch.float16), "bfloat16 bias", "bfloat16 bias"),
        (GemmProblem(16, 512, 512), "Triton is faster", "Triton is faster"),
    ],
)
def test_scaled_mm_takes_what_its_rules_allow(problem: GemmProblem, block_reason, row_reason):
    if problem.sm == 90 and not hasattr(torch.nn.functional, "scaled_mm"):
        block_reason = "needs torch 2.10"
    for module, reason in ((block_scaled_mm, block_reason), (row_scaled_mm, row_reason)):
        found = module.supports(problem)
        assert found is None if reason is None else reason in found
