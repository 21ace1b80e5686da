"""Products of 16-bit activations with heads' slices of an FP8 projection: the definition, the kernel, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quantlab_kernels import bmm_fp8
from quantlab_kernels.bmm_fp8 import op, reference
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.hardware import present_sm
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.quantize_fp8 import reference as quantizer

# Heads, rows and columns of each, first and count of the slice: whole blocks, heads that end inside of one, one head.
SLICES = [(16, 256, 512, 0, 128), (16, 256, 512, 128, 128), (4, 448, 512, 192, 256), (3, 160, 256, 64, 96),
          (8, 128, 384, 0, 64), (1, 48, 64, 16, 32)]  # fmt: skip


def operands(kind: str, m: int, part: tuple, transposed: bool, device="cpu", dtype=torch.float16):
    """a [M, H, K], w, w_scale; block scales differ by up to a thousand."""
    heads, rows, columns, _, count = part
    k = columns if transposed else count
    a = operand(kind, m * heads, k, seed=1, device=device).to(dtype).view(m, heads, k)
    w = operand("positive" if kind == "positive" else "rows", heads * rows, columns, seed=2, device=device)
    return a, *quantizer.block(w, None, False)


def held(out, a, w, w_scale, first, count, transposed):
    """Worst element against the bound of float32 sums."""
    exact = reference.bmm(a, w, w_scale, first, count, transposed)
    magnitude = reference.bmm(a.abs(), w.float().abs().to(w.dtype), w_scale, first, count, transposed)
    return worst(out, exact, gemm_bound(exact, magnitude, a.shape[2], a.dtype, "float32"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("part", SLICES)
def test_the_definition_is_each_heads_product(part, transposed):
    """In a loop over heads, on the weight dequantized element by element."""
    heads, rows, _, first, count = part
    a, w, w_scale = operands("normal", 3, part, transposed, dtype=torch.float32)
    out = bmm_fp8(a, w, w_scale, first=first, count=count, transposed=transposed)
    assert out.is_contiguous()
    for head in range(heads):
        at = torch.arange(head * rows + first, head * rows + first + count)
        scale = w_scale[at // 128][:, torch.arange(w.shape[1]) // 128].double()
        weight = w[at].double() * scale
        expected = a[:, head].double() @ (weight.t() if transposed else weight)
        torch.testing.assert_close(out[:, head].double(), expected, atol=1e-4, rtol=1e-5)
    assert held(out, a, w, w_scale, first, count, transposed).ratio <= 1


def test_strides_and_no_tokens():
    part = SLICES[2]
    a, w, w_scale = operands("normal", 5, part, False)
    views = [a.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((a, a), -1)[..., :256]]
    given = {"first": 192, "count": 256}
    expected = bmm_fp8(a, w, w_scale, **given)
    assert all(torch.equal(bmm_fp8(view, w, w_scale, **given), expected) for view in views)
    assert bmm_fp8(a[:0], w, w_scale, **given).shape == (0, 4, 512)


def test_refusals():
    a, w, w_scale = operands("normal", 2, SLICES[0], False)
    with pytest.raises(RuntimeError, match=r"a is torch.float16 \(2, 2048\), needs floats of shape \[M, H, K\]"):
        bmm_fp8(a.flatten(1), w, w_scale, first=0, count=128)
    with pytest.raises(RuntimeError, match=r"w is torch.float32 .*, needs float8_e4m3fn"):
        bmm_fp8(a, w.float(), w_scale, first=0, count=128)
    with pytest.raises(RuntimeError, match="as many rows for each of 15 heads"):
        bmm_fp8(a[:, 1:], w, w_scale, first=0, count=128)
    with pytest.raises(RuntimeError, match=r"needs float32 \(32, 4\)"):
        bmm_fp8(a, w, w_scale[:, :3], first=0, count=128)
    with pytest.raises(RuntimeError, match="rows 192 to 320 of a head, which has 256"):
        bmm_fp8(a, w, w_scale, first=192, count=128)
    with pytest.raises(RuntimeError, match=r"a is \(2, 16, 128\), needs K = 512"):
        bmm_fp8(a, w, w_scale, first=0, count=128, transposed=True)


def test_what_triton_takes():
    from quantlab_kernels.bmm_fp8 import triton as backend

    problem = op.Problem(1, 16, 256, 512, 128, 128, False)
    assert backend.supports(problem) is None
    assert backend.step(problem) == 128
    assert backend.step(replace(problem, rows=448, count=192, first=0)) == 64
    assert backend.step(replace(problem, rows=448, count=256, first=192, transposed=True)) == 128
    assert "these are torch.float32" in backend.supports(replace(problem, dtype=torch.float32))
    assert "in multiples of 16" in backend.supports(replace(problem, rows=200, count=100))
    assert "sm_75" in backend.supports(replace(problem, sm=75))


def test_compiles_whole():
    a, w, w_scale = operands("normal", 3, SLICES[3], True)

    def call(a):
        return bmm_fp8(a, w, w_scale, first=64, count=96, transposed=True) + 1

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)(a), call(a))


def check_every_configuration(device: str, sm: int, kinds, tokens, dtype=torch.float16) -> int:
    """Every way of the kernel inside the bound, twice the same, nothing written around it; how many ran."""
    from quantlab_kernels.bmm_fp8 import triton as backend

    ran = 0
    for at, part in enumerate(SLICES):
        for transposed in (False, True):
            kind, m = kinds[at % len(kinds)], tokens[at % len(tokens)]
            a, w, w_scale = operands(kind, m, part, transposed, device, dtype)
            wide = torch.cat((a, torch.full_like(a, torch.nan)), -1)[..., : a.shape[2]]
            heads, rows, columns, first, count = part
            problem = op.Problem(m, heads, rows, columns, first, count, transposed, a.dtype, sm)
            usual = backend.config(problem)
            for config in (usual, replace(usual, block_m=16, block_n=128, swap=not usual.swap)):
                n = count if transposed else columns
                buffer = torch.full((m + 2, heads, n), torch.nan, device=device, dtype=a.dtype)
                backend.launch(problem, wide, w, w_scale, buffer[1:-1], config)
                found = held(buffer[1:-1], a, w, w_scale, first, count, transposed)
                assert found.ratio <= 1, f"{problem} {config}: {found}"
                assert buffer[[0, -1]].isnan().all(), "wrote outside of its result"
                again = torch.empty_like(buffer[1:-1])
                backend.launch(problem, wide, w, w_scale, again, config)
                assert torch.equal(again, buffer[1:-1])
                ran += 1
    return ran


def test_the_kernel_interpreted(interpreted: Callable[[str], str]):
    """Its logic, with the integer decode of GPUs without FP8."""
    program = """
import test_bmm_fp8 as t
t.SLICES = [(2, 448, 128, 192, 256), (3, 160, 128, 64, 96), (1, 48, 64, 16, 32)]
print(t.check_every_configuration("cpu", 80, ["normal", "rows", "outliers"], [3, 17, 1]))
"""
    assert int(interpreted(program)) == 12


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_element_is_inside_the_bound(dtype):
    for kind in KINDS:
        assert check_every_configuration("cuda", present_sm(), [kind], [1, 16, 130, 7, 64, 300], dtype) == 24


@pytest.mark.gpu(sm=80)
def test_dispatch_takes_triton_and_a_graph_repeats_it():
    part = SLICES[0]
    a, w, w_scale = operands("normal", 4, part, True, "cuda", torch.bfloat16)
    given = {"first": 128, "count": 128, "transposed": True}
    assert [v.backend for v in op.BACKENDS.explain(op.problem_of(a, w, *given.values())) if v.chosen] == ["triton"]
    expected = bmm_fp8(a, w, w_scale, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bmm_fp8(a, w, w_scale, **given)
    changed = operands("outliers", 4, part, True, "cuda", torch.bfloat16)
    a.copy_(changed[0])
    graph.replay()
    assert torch.equal(out, bmm_fp8(a, w, w_scale, **given))
    assert not torch.equal(out, expected)
    compiled = torch.compile(lambda a: bmm_fp8(a, w, w_scale, **given) * 2, fullgraph=True)
    assert torch.equal(compiled(a), out * 2)
