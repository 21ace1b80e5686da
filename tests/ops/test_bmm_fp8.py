"""Products of 16-bit activations with heads' slices of an FP8 projection: the definition, the kernel, refusals."""

from __future__ import annotations

import math
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
        weight = w.double()[at] * scale  # torch 2.9 cannot index E4M3 on a CPU
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


def check(backend, problem: op.Problem, kind: str, device: str, configs) -> None:
    """Inside the bound, twice the same, nothing read beside the operands or written beside the result."""
    p = problem
    part = p.heads, p.rows, p.columns, p.first, p.count
    a, w, w_scale = operands(kind, p.m, part, p.transposed, device, p.dtype)
    wide = torch.cat((a, torch.full_like(a, torch.nan)), -1)[..., : p.k]
    for config in configs:
        buffer = torch.full((p.m + 2, p.heads, p.n), torch.nan, device=device, dtype=p.dtype)
        backend.launch(p, wide, w, w_scale, buffer[1:-1], config)
        found = held(buffer[1:-1], a, w, w_scale, p.first, p.count, p.transposed)
        assert found.ratio <= 1, f"{p} {config}: {found}"
        assert buffer[[0, -1]].isnan().all(), "wrote outside of its result"
        again = torch.empty_like(buffer[1:-1])
        backend.launch(p, wide, w, w_scale, again, config)
        assert torch.equal(again, buffer[1:-1])


def problems(tokens, dtype=torch.float16, sm=80):
    """Every slice in both directions, with one of the numbers of tokens each."""
    for at, (heads, rows, columns, first, count) in enumerate(SLICES):
        for transposed in (False, True):
            yield op.Problem(tokens[at % len(tokens)], heads, rows, columns, first, count, transposed, dtype, sm)


def check_triton(device: str, kinds, given) -> int:
    """Usual and other configurations; how many problems."""
    from quantlab_kernels.bmm_fp8 import triton as backend

    posed = list(given)
    for problem in posed:
        usual = backend.config(problem)
        for kind in kinds:
            check(backend, problem, kind, device, (usual, replace(usual, block_m=16, block_n=128, swap=not usual.swap)))
    return len(posed)


def test_triton_interpreted(interpreted: Callable[[str], str]):
    """Its logic, with the integer decode of GPUs without FP8."""
    program = """
import test_bmm_fp8 as t
t.SLICES = [(2, 448, 128, 192, 256), (3, 160, 128, 64, 96), (1, 48, 64, 16, 32)]
print(t.check_triton("cpu", ["rows"], t.problems([3, 17, 1])))
"""
    assert int(interpreted(program)) == 6


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 12), (torch.float16, 4)])
def test_triton_is_inside_the_bound(dtype, count):
    posed = list(problems([1, 16, 130, 7, 64, 300], dtype, present_sm()))[:count]
    assert check_triton("cuda", KINDS, posed) == count


def hopper_configs(problem: op.Problem) -> list:
    """The usual one, and whatever else may run it."""
    from quantlab_kernels.bmm_fp8 import sm90 as backend

    unit = math.gcd(problem.rows, problem.first, problem.count)
    tiles = (2,) if problem.transposed else tuple(n for n in (2, 4, 8) if unit % (256 // n) == 0)
    others = [backend.Config(t, tokens, 2) for t in tiles for tokens in (1, 2)]
    return [backend.config(problem), *others]


@pytest.mark.gpu(sm=90)
@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 30), (torch.float16, 10)])
def test_hopper_is_inside_the_bound(dtype, count):
    """Every way to share out the work; the last tile of tokens is not full."""
    from quantlab_kernels.bmm_fp8 import sm90 as backend
    from quantlab_kernels.common import nvrtc

    every = (p for m in (13, 1, 70) for p in problems([m], dtype, 90))
    posed = [p for p in every if backend.able(p) is None][:count]
    assert len(posed) == count
    nvrtc.compile_all([backend.source(*key) for key in {backend.key(p, c) for p in posed for c in hopper_configs(p)}])
    for at, problem in enumerate(posed):
        for kind in KINDS if at < 10 else ("rows",):
            check(backend, problem, kind, "cuda", hopper_configs(problem))


def test_hopper_shares_out_tokens_where_heads_are_few(monkeypatch):
    from quantlab_kernels.bmm_fp8 import sm90 as backend

    keys = op.Problem(128, 16, 256, 512, 0, 128, False)
    assert backend.config(keys) == backend.Config(2, 2, 8)
    assert backend.config(replace(keys, heads=128)) == backend.Config(2, 2, 1)
    assert backend.config(replace(keys, m=1)) == backend.Config(8, 1, 1)
    assert backend.config(replace(keys, rows=448, count=192)) == backend.Config(4, 2, 8)
    assert backend.config(replace(keys, rows=160, first=64, count=96)) == backend.Config(8, 1, 8)
    assert backend.config(replace(keys, m=16, first=128, transposed=True)) == backend.Config(2, 2, 1)
    assert "compiled for sm_90 only, the GPU is sm_80" in backend.supports(replace(keys, sm=80))
    assert "multiples of 32" in backend.supports(replace(keys, count=48))
    monkeypatch.setattr(backend.nvrtc, "missing", lambda: None)
    for few, transposed, most in ((False, False, 128), (False, True, 64), (True, False, 8), (True, True, 16)):
        changes = {"heads": 16 if few else 128, "transposed": transposed}
        assert backend.supports(replace(keys, m=most, **changes)) is None
        refused = backend.supports(replace(keys, m=most + 1, **changes))
        assert f"more than {most} tokens, these are {most + 1}" in refused


@pytest.mark.gpu(sm=90)
def test_hopper_reads_a_weight_anew_that_was_written_just_before():
    """A launch may start early only once its weight is settled."""
    a, w, w_scale = operands("normal", 4, SLICES[0], False, "cuda", torch.bfloat16)
    other = w.view(torch.uint8).roll(1, 0).view(w.dtype)
    given = {"first": 0, "count": 128}
    expected = [bmm_fp8(a, codes.clone(), w_scale, **given) for codes in (w, other)]
    assert not torch.equal(*expected)
    weight = w.clone()
    for codes, result in zip((w, other, w), (*expected, expected[0]), strict=True):
        weight.copy_(codes)
        assert all(torch.equal(bmm_fp8(a, weight, w_scale, **given), result) for _ in range(3))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("m", [4, 140])
def test_dispatch_and_a_graph_repeats_it(m):
    part, backend = SLICES[0], "sm90" if m <= 128 and present_sm() == 90 else "triton"
    a, w, w_scale = operands("normal", m, part, True, "cuda", torch.bfloat16)
    given = {"first": 128, "count": 128, "transposed": True}
    assert [v.backend for v in op.BACKENDS.explain(op.problem_of(a, w, *given.values())) if v.chosen] == [backend]
    expected = bmm_fp8(a, w, w_scale, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bmm_fp8(a, w, w_scale, **given)
    a.copy_(operands("outliers", m, part, True, "cuda", torch.bfloat16)[0])
    graph.replay()
    assert torch.equal(out, bmm_fp8(a, w, w_scale, **given))
    assert not torch.equal(out, expected)
    compiled = torch.compile(lambda a: bmm_fp8(a, w, w_scale, **given) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a), out * 2)
