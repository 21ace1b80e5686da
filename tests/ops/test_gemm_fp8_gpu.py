"""Both FP8 GEMM rooms on a GPU: every backend inside the error bound, on data that break kernels."""

from __future__ import annotations

import importlib

import pytest
import torch

from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import empty_group_scale
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.quantize_fp8 import reference as quantizer

pytestmark = pytest.mark.gpu(sm=80)

ROOMS = {name: importlib.import_module(f"quantlab_kernels.{name}.op") for name in ("gemm_fp8_block", "gemm_fp8_row")}
BACKENDS = [(room, name) for room, op in ROOMS.items() for name in op.BACKENDS.names if name != "eager"]
# A model's shapes and what breaks tiles: one token, ragged M, N off 128 and off 16, one group of K, the longest K.
OUTPUTS = [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True), (torch.float32, False)]  # with bias
SHAPES = [(1, 384, 512), (16, 576, 896), (17, 200, 128), (128, 512, 2048), (1000, 768, 1536), (256, 512, 16384)]
BORDER = 1024


def inside(tensor: torch.Tensor, fill: float | int) -> torch.Tensor:
    """A copy that lies in the middle of a larger buffer full of `fill`."""
    buffer = torch.full((tensor.numel() + 2 * BORDER,), fill, dtype=tensor.dtype, device=tensor.device)
    view = buffer[BORDER : BORDER + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def operands(room: str, kind: str, m: int, n: int, k: int):
    """Quantized operands on the GPU; what lies around the codes decodes to NaN, what lies around the scales is NaN."""
    x = operand(kind, m, k, seed=1, device="cuda")
    w = operand("positive" if kind == "positive" else "normal", n, k, seed=2, device="cuda")
    if room == "gemm_fp8_block":
        (a, a_scale), (b, b_scale) = quantizer.group(x, None, False), quantizer.block(w, None, True)
        padded = inside(torch.full((a_scale.shape[1], a_scale.stride(1)), torch.nan, device="cuda"), torch.nan)
        a_scale = padded.t()[:m].copy_(a_scale)
    else:
        (a, a_scale), (b, b_scale) = quantizer.token(x), quantizer.token(w)
        a_scale = inside(a_scale, torch.nan)
    fp8 = torch.float8_e4m3fn
    a, b = (inside(codes.view(torch.uint8), 0x7F).view(fp8) for codes in (a, b))
    return a, a_scale, b, inside(b_scale, torch.nan)


def exact_and_magnitude(room: str, a, a_scale, b, b_scale, bias):
    reference = importlib.import_module(f"quantlab_kernels.{room}.reference")
    positive = [t.float().abs().to(t.dtype) for t in (a, b)]
    exact = reference.gemm(a, a_scale, b, b_scale, bias)
    return exact, reference.gemm(positive[0], a_scale, positive[1], b_scale, None if bias is None else bias.abs())


def launch(room: str, backend: str, a, a_scale, b, b_scale, bias, out_dtype) -> torch.Tensor:
    """The backend's result, written over NaN; fails if anything around it was touched."""
    op = ROOMS[room]
    problem = op.problem_of(a, b, bias, out_dtype)
    module = op.BACKENDS.module(backend)
    out = inside(torch.full((a.shape[0], b.shape[0]), torch.nan, dtype=out_dtype, device="cuda"), -7.0)
    module.launch(a, a_scale, b, b_scale, bias, out, module.config(problem))
    whole = torch.as_strided(out, (out.numel() + 2 * BORDER,), (1,), out.storage_offset() - BORDER)
    border = torch.cat([whole[:BORDER], whole[-BORDER:]])
    assert (border == -7).all(), f"{backend} wrote outside its result"
    return out


@pytest.mark.parametrize(("room", "backend"), BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_inside_the_bound(room: str, backend: str, kind: str):
    op = ROOMS[room]
    able = 0
    for m, n, k in SHAPES:
        a, a_scale, b, b_scale = operands(room, kind, m, n, k)
        for out_dtype, with_bias in OUTPUTS:
            bias = torch.linspace(-1, 1, n, device="cuda").to(torch.bfloat16) if with_bias else None
            problem = op.problem_of(a, b, bias, out_dtype)
            if op.BACKENDS.reason(backend, problem, question="able"):
                continue
            able += 1
            out = launch(room, backend, a, a_scale, b, b_scale, bias, out_dtype)
            assert torch.equal(out, launch(room, backend, a, a_scale, b, b_scale, bias, out_dtype)), "two runs differ"
            exact, magnitude = exact_and_magnitude(room, a, a_scale, b, b_scale, bias)
            found = worst(out, exact, gemm_bound(exact, magnitude, k, out_dtype, "fp8"))
            assert found.ratio <= 1, f"{problem}: {found}"
    assert able, f"{backend} ran none of the shapes"


@pytest.mark.parametrize("room", ROOMS)
def test_one_signed_sums_of_long_k_keep_their_value(room: str):
    """Without promotion the sum loses a quarter here; with it, less than the rounding of the result."""
    a, a_scale, b, b_scale = operands(room, "positive", 256, 512, 16384)
    out = ROOMS[room]._OP(a, a_scale, b, b_scale, None, torch.bfloat16)
    exact, _ = exact_and_magnitude(room, a, a_scale, b, b_scale, None)
    assert float((out.double() - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", ["scaled_mm", "triton", "eager"])
def test_a_backend_is_forced_by_name(room: str, name: str, monkeypatch):
    op = ROOMS[room]
    monkeypatch.setenv(op.BACKENDS.variable, name)
    a, a_scale, b, b_scale = operands(room, "normal", 64, 256, 512)
    problem = op.problem_of(a, b, None, torch.bfloat16)
    if op.BACKENDS.reason(name, problem, question="able"):
        with pytest.raises(RuntimeError, match=op.BACKENDS.variable):
            op._OP(a, a_scale, b, b_scale, None, torch.bfloat16)
        return
    out = op._OP(a, a_scale, b, b_scale, None, torch.bfloat16)
    exact, magnitude = exact_and_magnitude(room, a, a_scale, b, b_scale, None)
    assert worst(out, exact, gemm_bound(exact, magnitude, 512, torch.bfloat16, "fp8")).ratio <= 1
    assert [v.chosen for v in op.BACKENDS.explain(problem) if v.backend == name] == [True]


@pytest.mark.parametrize("room", ROOMS)
def test_every_tuned_configuration_is_right(room: str):
    """Those of `gemm_fp8_block`, which alone has a table, in both rooms."""
    from quantlab_kernels.common import triton_gemm
    from quantlab_kernels.common.gemm import GemmProblem
    from quantlab_kernels.common.gemm_configs import Config, reject
    from quantlab_kernels.common.hardware import gpu
    from quantlab_kernels.common.tuning import table

    entries = table("gemm_fp8_block", "NVIDIA_H200")["triton"]
    tuned = {Config(**config) for by_m in entries.values() for config in by_m.values()}
    configs = [config for config in tuned if reject(config, GemmProblem(200, 576, 1152, sm=gpu().sm)) is None]
    assert configs
    for m in (5, 200):
        a, a_scale, b, b_scale = operands(room, "positive", m, 576, 1152)
        exact, magnitude = exact_and_magnitude(room, a, a_scale, b, b_scale, None)
        bound = gemm_bound(exact, magnitude, 1152, torch.float32, "fp8")
        for config in configs:
            out = torch.full((m, 576), torch.nan, device="cuda")
            triton_gemm.launch(
                a, a_scale, b, b_scale, None, out, config, blocked=room == "gemm_fp8_block", native=gpu().sm >= 89
            )
            assert worst(out, exact, bound).ratio <= 1, config


@pytest.mark.parametrize("room", ROOMS)
def test_k_off_128_is_slow_right_and_said(room: str):
    from quantlab_kernels.common.backends import FallbackWarning

    op = ROOMS[room]
    op.BACKENDS._warned.clear()
    op.BACKENDS._chosen.clear()
    a, a_scale, b, b_scale = operands(room, "normal", 8, 64, 200)
    with pytest.warns(FallbackWarning, match="K = 200"):
        out = op._OP(a, a_scale, b, b_scale, None, torch.float32)
    exact, magnitude = exact_and_magnitude(room, a, a_scale, b, b_scale, None)
    assert worst(out, exact, gemm_bound(exact, magnitude, 200, torch.float32, "float32")).ratio <= 1


@pytest.mark.parametrize("room", ROOMS)
def test_the_op_is_captured_in_a_graph(room: str):
    op = ROOMS[room]
    a, a_scale, b, b_scale = operands(room, "normal", 128, 512, 512)
    expected = op._OP(a, a_scale, b, b_scale, None, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op._OP(a, a_scale, b, b_scale, None, torch.bfloat16)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)


def test_empty_batch_and_other_scale_layouts():
    op = ROOMS["gemm_fp8_block"]
    a, a_scale, b, b_scale = operands("gemm_fp8_block", "rows", 36, 256, 512)
    expected = op._OP(a, a_scale, b, b_scale, None, torch.float32)
    assert torch.equal(op._OP(a, a_scale.contiguous(), b, b_scale, None, torch.float32), expected)
    none = op._OP(a[:0], empty_group_scale(a, 0, 4), b, b_scale, None, torch.float32)
    assert none.shape == (0, 256)
