"""attention_quantize: the definition undoes itself, the kernel agrees with it, padding does not matter."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantlab_kernels import attention_8bit, attention_prefill, attention_quantize, rope
from quantlab_kernels.attention_quantize import reference, sm90
from quantlab_kernels.attention_quantize.op import CODES, HEAD_DIMS, Quantized
from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.hardware import gpu

FORMATS = ["int8", "fp8"]


def inputs(
    d: int, heads: tuple[int, int], lengths: tuple[int, int], dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys with a large mean, values with a mean; a head of zeros and rows of very different magnitude."""
    generator = torch.Generator().manual_seed(d + sum(lengths))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = draw(2, heads[0], lengths[0], d) * torch.logspace(-2, 1, lengths[0])[:, None]
    k = draw(2, heads[1], lengths[1], d) + 8 * draw(2, heads[1], 1, d)
    v = draw(2, heads[1], lengths[1], d) + 1
    v[0, 0, : lengths[1] // 2] *= 10
    k[1, -1] = 0
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def tables(length: int, r: int, like: Tensor, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Cosines and sines [batch, length, r]; those of both channels of a pair differ, which no kernel may count on."""
    angle = torch.rand(batch, length, r, generator=torch.Generator().manual_seed(r)) * 6.3
    return angle.cos().to(like), angle.sin().to(like)


def half_a_step(scale: Tensor, values: Tensor, fmt: str) -> Tensor:
    """Largest error of a code: half of a step of INT8; E4M3 keeps four bits, of numbers above 2**-6."""
    return 0.5 * scale if fmt == "int8" else torch.maximum(2.0**-4 * values.abs(), 2.0**-10 * scale)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_rotation_is_orthonormal(d: int):
    turn = reference.rotation(d)
    assert torch.allclose(turn @ turn.T, torch.eye(d, dtype=torch.float64), atol=1e-14)
    assert (reference.hadamard(d).abs().sum(0) == (d & -d)).all()


def test_key_order_is_what_an_accumulator_holds():
    """Thread t of a quad: scores of keys 8 j + 2 t + {0, 1}; operand bytes 4 t .. and 16 + 4 t .. of every 32."""
    order = reference.key_order()
    assert sorted(order.tolist()) == list(range(128))
    for thread in range(4):
        scores = [8 * j + 2 * thread + e for j in range(16) for e in range(2)]
        places = [32 * c + 16 * half + 4 * thread + i for c in range(4) for half in range(2) for i in range(4)]
        assert order[places].tolist() == scores
        assert (reference.key_group()[scores] == thread).all()


@pytest.mark.parametrize("d", sm90.HEAD_DIMS)
def test_operands_of_the_hopper_kernel_make_the_rotation(d: int):
    """MMAs for four bits of a channel's number, additions for the others: what `sm90.cu` does, in algebra."""
    chunks, span = d // 32, (d & -d) // 32
    x = torch.randn(d, dtype=torch.float64)
    by_thread = x.view(chunks, 4, 2, 2, 2)  # chunk, thread of a quad, half, register, element
    operands = sm90.fragments(d).view(chunks, 2, 8, 4, 2, 2, 2)  # lane = 4 column + thread of the quad
    sums = torch.einsum("cthre,chntjre->chnj", by_thread, operands).view(-1, 2 * span, 4, 2, 2)
    other_bits = torch.ones(1, 1, dtype=torch.float64)
    for _ in range((2 * span).bit_length() - 1):
        other_bits = torch.kron(other_bits, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    out = torch.einsum("bpqij,op->boqji", sums, other_bits)  # block, bits, thread, register, element
    out = out.view(-1, 2, 4, 4).transpose(1, 2).flatten()
    assert torch.allclose(out, x @ reference.hadamard(d))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("d", [64, 80, 256])
def test_codes_stand_for_the_inputs(d: int, fmt: str):
    q, k, v = inputs(d, (4, 2), (5, 300))
    z = attention_quantize(q, k, v, qk=fmt, pv=fmt)
    turn = reference.rotation(d)
    turned = q.double() @ turn
    error = (z.q.double() * z.q_scale.double()[..., None] - turned).abs()
    assert (error <= 1e-4 * turned.abs() + 1.001 * half_a_step(z.q_scale[..., None].double(), turned, fmt)).all()
    keys = (k.double() - reference.sampled_mean(k.double(), None)[:, :, None]) @ turn
    scale = z.k_scale.double()[..., reference.key_group()].flatten(2)[:, :, :300, None]
    assert ((z.k.double() * scale - keys).abs() <= 1e-4 + 1.001 * half_a_step(scale, keys, fmt)).all()
    values = (v.double() - z.v_mean.double()[:, :, None]) @ turn
    back = reference.dequantize_values(z.v, z.v_scale, 300) @ turn
    scale = z.v_scale.double().repeat_interleave(128, 2)[:, :, :300, None]
    assert ((back - values).abs() <= 1e-4 + 1.001 * half_a_step(scale, values, fmt)).all()
    shift = (q.double() * reference.sampled_mean(k.double(), None).repeat_interleave(2, 1)[:, :, None]).sum(-1)
    assert torch.allclose(z.q_shift.double(), shift, atol=1e-3)


def test_padding_does_not_matter():
    q, k, v = inputs(64, (2, 2), (3, 200))
    key_range = torch.tensor([[7, 200], [0, 150]], dtype=torch.int32)
    clean = attention_quantize(q, k, v, key_range=key_range)
    for x in (k, v):
        x[0, :, :7] = float("nan")
        x[1, :, 150:] = float("inf")
    for name, a, b in zip(Quantized._fields, clean, attention_quantize(q, k, v, key_range=key_range), strict=True):
        assert torch.equal(a, b), name
    assert (clean.k[0, :, :7] == 0).all()
    empty = attention_quantize(q, k, v, key_range=torch.zeros(2, 2, dtype=torch.int32))
    assert (empty.v == 0).all()
    assert (empty.v_mean == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotary_embedding_is_that_of_rope(dtype: torch.dtype):
    q, k, v = inputs(64, (4, 2), (140, 140), dtype)
    cos, sin = tables(140, 48, q)
    made = attention_quantize(q, k, v, cos=cos, sin=sin)
    expected = attention_quantize(*rope(q, k, cos, sin), v)
    for name, a, b in zip(Quantized._fields, made, expected, strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(made.q, attention_quantize(q, k, v).q)
    out, _ = attention_8bit(q, k, v, causal=True, cos=cos, sin=sin)
    assert torch.equal(out, attention_8bit(*rope(q, k, cos, sin), v, causal=True)[0])


def test_interleaved_channels_turn_with_their_neighbours():
    """Channels 0, 2, 4 .. then 1, 3, 5 ..: halves of these are pairs of those."""
    q, k, v = inputs(64, (4, 2), (20, 20), torch.bfloat16)
    cos, sin = tables(20, 32, q, batch=2)
    order = torch.cat([torch.arange(0, 32, 2), torch.arange(1, 32, 2)])
    back = torch.cat([torch.argsort(order), torch.arange(32, 64)])
    order = torch.cat([order, torch.arange(32, 64)])
    turned = rope(q[..., order], k[..., order], cos[..., order[:32]], sin[..., order[:32]])
    expected = attention_quantize(*(x[..., back] for x in turned), v)
    made = attention_quantize(q, k, v, cos=cos, sin=sin, interleaved=True)
    for name, a, b in zip(Quantized._fields, made, expected, strict=True):
        assert torch.equal(a, b), name


def test_no_keys():
    q, k, v = inputs(64, (2, 2), (3, 5))
    z = attention_quantize(q, k[:, :, :0], v[:, :, :0])
    assert torch.equal(z.q, attention_quantize(q, k, v).q)
    assert (z.v_mean == 0).all()
    assert (z.q_shift == 0).all()


def close(made: Quantized, expected: Quantized) -> None:
    """As equal as a product in another order allows: a code may be the next one where it was nearly a tie."""
    for name, a, b in zip(Quantized._fields, made, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.dtype == torch.float32:
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-9), name
            continue
        if a.dtype == torch.int8:
            far, different = (a.int() - b.int()).abs() > 1, a != b
        else:
            x, y = a.float(), b.float()
            far, different = (x - y).abs() > 0.13 * torch.maximum(x.abs(), y.abs()) + 2.0**-8, x != y
        assert not far.any(), name
        assert different.float().mean() < 0.02, name


PROBLEMS = [("sm90", d, fmt, torch.bfloat16) for d in (64, 96, 128) for fmt in FORMATS]
PROBLEMS += [("sm90", 64, "int8", torch.float16), ("sm90", 128, "fp8", torch.float16)]
PROBLEMS += [("triton", 64, "int8", torch.bfloat16), ("triton", 80, "fp8", torch.float16)]
PROBLEMS += [("triton", 128, "fp8", torch.bfloat16), ("triton", 256, "int8", torch.bfloat16)]
PROBLEMS += [("eager", 128, "int8", torch.float32)]


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize(("backend", "d", "fmt", "dtype"), PROBLEMS)
def test_on_the_gpu(backend: str, d: int, fmt: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    if backend == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    monkeypatch.setenv("QUANTLAB_ATTENTION_QUANTIZE_BACKEND", backend)
    q, k, v = inputs(d, (4, 2), (130, 700), dtype, "cuda")
    for key_range in (None, torch.tensor([[3, 700], [0, 650]], dtype=torch.int32, device="cuda")):
        made = attention_quantize(q, k, v, key_range=key_range, qk=fmt, pv=fmt)
        close(made, Quantized(*reference.quantize(q, k, v, key_range, CODES[fmt], CODES[fmt])))
    one = attention_quantize(q[:, :, :1], k[:, :, :1], v[:, :, :1], qk=fmt, pv=fmt)
    assert torch.allclose(one.v_mean, v[:, :, 0].float())


# Backend, D, channels that turn, interleaved, dtype.
TURNING = [("sm90", 128, 128, False, torch.bfloat16), ("sm90", 128, 64, True, torch.bfloat16)]
TURNING += [("sm90", 64, 16, False, torch.float16), ("sm90", 96, 96, False, torch.bfloat16)]
TURNING += [("triton", 80, 20, True, torch.float16)]


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize(("backend", "d", "r", "interleaved", "dtype"), TURNING)
def test_rotary_embedding_on_the_gpu(
    backend: str, d: int, r: int, interleaved: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """The same codes as of what was turned before by torch, all of them: the embedding is exact."""
    if backend == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    monkeypatch.setenv("QUANTLAB_ATTENTION_QUANTIZE_BACKEND", backend)
    q, k, v = inputs(d, (4, 2), (700, 700), dtype, "cuda")
    k[1, :, :5] = k[0, :, 690:] = float("nan")
    key_range = torch.tensor([[0, 690], [5, 700]], dtype=torch.int32, device="cuda")
    for cos, sin in (tables(700, r, q), tables(700, r, q, batch=2)):
        turned = reference.Rotary(cos, sin, interleaved)
        made = attention_quantize(q, k, v, key_range=key_range, cos=cos, sin=sin, interleaved=interleaved)
        expected = attention_quantize(turned.embed(q), turned.embed(k), v, key_range=key_range)
        for name, a, b in zip(Quantized._fields, made, expected, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.gpu(sm=80)
def test_strided_inputs_on_the_gpu():
    wide = torch.randn(2, 200, 3 * 4 * 128 + 4, device="cuda", dtype=torch.bfloat16)
    for part in (wide[..., :-4], wide[..., 4:]):  # the second at no multiple of 16 bytes
        q, k, v = part.unflatten(2, (12, 128)).transpose(1, 2).chunk(3, 1)
        close(attention_quantize(q, k, v), attention_quantize(*(x.contiguous() for x in (q, k, v))))


# Loads 220 registers of each thread before it uses the first one; a multiprocessor runs 256 such threads at once.
FILL = """
struct Params { const unsigned* source; unsigned* sink; };
extern "C" __global__ void __launch_bounds__(256) fill_registers(const __grid_constant__ Params p) {
  unsigned value[220], factor, sum = 0;
#pragma unroll
  for (int i = 0; i < 220; ++i) asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(value[i]) : "l"(p.source));
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(factor) : "l"(p.source));
#pragma unroll
  for (int i = 0; i < 220; ++i) sum = sum * factor + value[i];
  *p.sink = sum;
}
"""


@pytest.mark.gpu(sm=80)
def test_one_key_whatever_registers_hold(monkeypatch: pytest.MonkeyPatch):
    """Of a single key nothing is left but the mean: all codes are 0, and attention returns the value."""
    for room in ("QUANTIZE", "PREFILL"):
        monkeypatch.setenv(f"QUANTLAB_ATTENTION_{room}_BACKEND", "triton")
    architecture = f"sm_{gpu(0).sm}"
    fill = driver.Kernel(nvrtc.cubin(nvrtc.Source("fill", FILL, arch=architecture)), "fill_registers")
    q, k, v = inputs(80, (6, 3), (257, 1), torch.bfloat16, "cuda")
    v = (8 * v).round() / 8  # their mean, turned, is exact
    expected = v.float().repeat_interleave(2, 1).transpose(1, 2).expand(-1, 257, -1, -1)
    words = torch.tensor([-1, 0], dtype=torch.int32, device="cuda")
    params = struct.pack("<QQ", words.data_ptr(), words[1:].data_ptr())
    for _ in range(10):
        fill.launch(driver.Launch(2 * gpu(0).sm_count, 256, 1, 0), params, 0)
        z = attention_quantize(q, k, v, qk="fp8", pv="fp8")
        assert (z.v.float() == 0).all()
        fill.launch(driver.Launch(2 * gpu(0).sm_count, 256, 1, 0), params, 0)
        assert torch.equal(attention_prefill(z)[0].float(), expected)


INTERPRETED = """
import importlib, torch
op = importlib.import_module("quantlab_kernels.attention_quantize.op")
from quantlab_kernels.attention_quantize import reference, triton
import test_attention_quantize as tests
torch.set_num_threads(1)
for d, fmt, bounds in [(64, "int8", None), (80, "fp8", [[3, 140], [0, 90]])]:
    q, k, v = tests.inputs(d, (2, 1), (50, 140), torch.float16)
    key_range = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    codes = op.CODES[fmt]
    made = op._fake(q, k, v, key_range, codes, codes)
    triton.launch(q, k, v, key_range, made)
    tests.close(op.Quantized(*made), op.Quantized(*reference.quantize(q, k, v, key_range, codes, codes)))
for r, interleaved in [(48, False), (20, True)]:
    q, k, v = tests.inputs(64, (2, 1), (70, 70), torch.float16)
    rotary = reference.Rotary(*tests.tables(70, r, q), interleaved)
    made = op._fake(q, k, v, None, torch.int8, torch.int8)
    triton.launch(q, k, v, None, made, rotary)
    tests.close(op.Quantized(*made), op.Quantized(*reference.quantize(q, k, v, None, torch.int8, torch.int8, rotary)))
"""


def test_triton_logic_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(INTERPRETED)


def test_traces_and_refuses():
    q, k, v = inputs(64, (4, 2), (5, 40))
    op = torch.ops.quantlab.attention_quantize.default
    torch.library.opcheck(op, (q, k, v, None, torch.int8, torch.int8), test_utils="test_faketensor")
    cos, sin = tables(5, 16, q)
    turned = (q, k[:, :, :5], v[:, :, :5], None, torch.int8, torch.int8, cos, sin, True)
    torch.library.opcheck(op, turned, test_utils="test_faketensor")
    with pytest.raises(RuntimeError, match=r"cos torch.float32 \(1, 5, 16\).* as many queries as keys"):
        attention_quantize(q, k, v, cos=cos, sin=sin)
    with pytest.raises(RuntimeError, match="cos and sin go together"):
        attention_quantize(q, k, v, cos=cos)
    for wrong, text in [
        ((q[..., :40], k[..., :40], v[..., :40]), "head dimension 40"),
        ((q[:, :3], k, v), "Hq a multiple of Hkv"),
        ((q.double(), k, v), "torch.float64"),
        ((q[0], k, v), "3, 4, 4 dimensions"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            attention_quantize(*wrong)
    with pytest.raises(RuntimeError, match=r"key_range torch.int64 \(2, 2\), needs int32 \[2, 2\]"):
        attention_quantize(q, k, v, key_range=torch.zeros(2, 2, dtype=torch.int64))
