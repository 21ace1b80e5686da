"""rope against its float64 definition and, bit for bit, against the formula in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab_kernels import rope
from quantlab_kernels.rope import reference

U = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def operands(
    batch: int, heads: tuple[int, int], length: int, d: int, r: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Queries and keys as columns of one product, with values of very different size; angles of one sequence or all."""
    generator = torch.Generator().manual_seed(batch + 10 * length + d)
    joined = torch.randn(batch, length, sum(heads) + heads[1], d, generator=generator)
    joined *= torch.logspace(-3, 2, d)
    q, k, _ = joined.to(device, dtype).transpose(1, 2).split([heads[0], heads[1], heads[1]], dim=1)
    angle = 10 * torch.randn(batch if length % 2 else 1, length, r // 2, generator=generator).repeat(1, 1, 2)
    return q, k, angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    for x, out in zip((q, k), rope(q, k, cos, sin), strict=True):
        r = cos.shape[-1]
        exact = reference.rotate(x, cos, sin, torch.float64)
        a = x[..., :r].double().abs()
        size = torch.zeros_like(exact)  # |x| |cos| + |rotate_half(x)| |sin|: two products and a sum are rounded
        size[..., :r] = a * cos.double().abs()[:, None] + a.roll(r // 2, -1) * sin.double().abs()[:, None]
        assert bool(((out.double() - exact).abs() <= 2 * U[x.dtype] * size + 1e-7).all())
        assert out.transpose(1, 2).is_contiguous()
        if x.dtype != torch.float32:
            assert torch.equal(out, reference.rotate(x, cos, sin))
        assert torch.equal(out[..., r:], x[..., r:])


CASES = [(1, (4, 2), 5, 64, 64), (2, (3, 3), 4, 80, 80), (2, (9, 1), 3, 128, 32), (1, (8, 8), 1, 96, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_on_the_cpu(case, dtype: torch.dtype):
    check(*operands(*case, dtype, torch.device("cpu")))


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, (2, (32, 8), 1001, 128, 128), (64, (32, 8), 1, 128, 128)])
def test_on_the_gpu(case, dtype: torch.dtype):
    q, k, cos, sin = operands(*case, dtype, torch.device("cuda"))
    check(q, k, cos, sin)
    check(q.transpose(1, 2).contiguous().transpose(1, 2), k.contiguous(), cos, sin)  # the second of a kind, launched
    check(q.clone(), k.clone(), cos.clone(), sin.clone())
    check(q[..., 1:, :], k[..., 1:, :], cos[:, 1:], sin[:, 1:]) if q.shape[2] > 1 else None


@settings(max_examples=20)
@given(
    batch=st.integers(1, 3), q_heads=st.integers(1, 5), k_heads=st.integers(1, 5), length=st.integers(0, 6),
    half=st.integers(0, 8), rest=st.integers(0, 5),
)  # fmt: skip
def test_any_shape(batch: int, q_heads: int, k_heads: int, length: int, half: int, rest: int):
    shape = batch, (q_heads, k_heads), length, 2 * half + rest, 2 * half
    check(*operands(*shape, torch.bfloat16, torch.device("cpu")))


INTERPRETED = """
import importlib, torch
op = importlib.import_module("quantlab_kernels.rope.op")
from quantlab_kernels.rope import triton
import test_rope as tests
def rope(q, k, cos, sin):
    outs = op._fake(q, k, cos, sin)
    batch, heads, length, d = q.shape
    problem = op.Problem(batch * length, heads + k.shape[1], d, cos.shape[2], q.dtype, 80)
    triton.launch(problem, q, k, cos, sin, *outs, triton.config(problem))
    return outs
tests.rope = rope
for case in tests.CASES:
    tests.check(*tests.operands(*case, torch.float16, torch.device("cpu")))
"""


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED)


def test_traces_and_refuses():
    q, k, cos, sin = operands(1, (4, 2), 5, 64, 64, torch.bfloat16, torch.device("cpu"))
    op = torch.ops.quantlab.rope.default
    torch.library.opcheck(op, (q, k, cos, sin), test_utils="test_faketensor")
    with pytest.raises(RuntimeError, match=r"cos \(1, 5, 64\)|cos \(1, 4, 64\)"):
        rope(q, k, cos[:, :4], sin[:, :4])
    with pytest.raises(RuntimeError, match="needs one float dtype"):
        rope(q, k, cos.float(), sin.float())
