"""The arithmetic definition of quantized tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab_kernels.formats import E4M3, FORMATS, INT4, INT8
from quantlab_kernels.qtensor import TensorSpec, block_reduce, expand_blocks, quantize, scale_of

BLOCKS = [(-1, -1), (1, -1), (1, 128), (128, 128), (1, 32), (-1, 1)]
SPECS = [
    TensorSpec(format, block, scale=scale)
    for format in FORMATS.values()
    for block in BLOCKS
    for scale in ("float32", "power2")
    if not (format.bits == 4 and block[1] == -1)
]


def data(rows: int = 70, columns: int = 200, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 2, rows)[:, None]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format.name}-{s.block}-{s.scale}")
def test_error_is_at_most_half_a_step(spec: TensorSpec):
    x = data()
    q = quantize(x, spec)
    assert q.scale.shape == spec.scale_shape(tuple(x.shape))
    scale = expand_blocks(q.scale, spec.block, x.shape)
    if spec.format.is_float:  # relative to the value where it is normal, to the subnormal step below
        mantissa_bits, smallest = (3, 2.0**-9) if spec.format is E4M3 else (2, 2.0**-16)
        step = torch.maximum(x.abs() * 2.0**-mantissa_bits, smallest * scale)
    else:
        step = scale
    assert ((q.dequantize() - x).abs() <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format.name}-{s.block}-{s.scale}")
def test_codes_are_idempotent_and_scale_with_powers_of_two(spec: TensorSpec):
    x = data()
    q = quantize(x, spec)
    again = quantize(q.dequantize(), spec, q.scale)
    assert torch.equal(again.codes.view(torch.uint8), q.codes.view(torch.uint8))
    shifted = quantize(x * 2.0**5, spec)
    assert torch.equal(shifted.codes.view(torch.uint8), q.codes.view(torch.uint8))
    assert torch.equal(shifted.scale, q.scale * 2.0**5)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_zeros_one_element_and_nothing(format):
    spec = TensorSpec(format, (1, 128))
    q = quantize(torch.zeros(2, 130), spec)
    assert (q.scale == 1).all()
    assert not q.dequantize().any()
    one = quantize(torch.tensor([[3.0]]), spec)
    assert float(one.dequantize()) == pytest.approx(3.0, rel=1e-6)
    assert quantize(torch.zeros(0, 130), spec).scale.shape == (0, 2)
    assert quantize(torch.zeros(3, 0), spec).scale.shape == (3, 0)


def test_float32_scale_is_amax_over_max_and_power2_the_next_power():
    amax = torch.tensor([448.0, 449.0, 1e-3, 0.0, 1e-45, 3.4e38])
    plain = scale_of(amax, TensorSpec(E4M3, (1, 128)))
    divided = (amax.double() / 448).float()
    assert torch.equal(plain, torch.tensor([1.0, divided[1], divided[2], 1.0, 2.0**-126, divided[5]]))
    power2 = scale_of(amax, TensorSpec(E4M3, (1, 128), scale="power2"))
    assert torch.equal(power2, torch.tensor([1.0, 2.0, 2.0**-18, 1.0, 2.0**-126, 2.0**120]))


@pytest.mark.parametrize("scale", ["float32", "power2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_poison_their_group_and_no_other(scale, bad: float):
    x = data(4, 300)
    x[2, 130] = bad
    q = quantize(x, TensorSpec(E4M3, (1, 128), scale=scale))
    poisoned = q.dequantize().isnan()
    assert poisoned[2, 128:256].all() or not q.scale[2, 1].isfinite()
    poisoned[2, 128:256] = False
    assert not poisoned.any()


@pytest.mark.parametrize("format", [INT8, INT4])
def test_asymmetric_uses_the_whole_range_and_keeps_zero(format):
    x = data().clamp_min(0)
    q = quantize(x, TensorSpec(format, (1, 32), symmetric=False))
    assert int(q.codes.min()) == format.min
    assert int(q.codes.max()) == format.max
    step = expand_blocks(q.scale, (1, 32), x.shape)
    assert ((q.dequantize() - x).abs() <= step * 0.5001).all()


@given(
    st.integers(0, 40), st.integers(0, 40), st.sampled_from([(-1, -1), (1, -1), (3, 7), (1, 8), (16, 16)]),
    st.sampled_from(["amax", "amin", "sum"]),
)  # fmt: skip
def test_block_reduce_is_a_loop_over_blocks(rows: int, columns: int, block: tuple[int, int], how: str):
    x = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) - 50
    reduced = block_reduce(x, block, how)
    if rows == 0 or columns == 0:
        return
    r, c = (extent if b == -1 else b for b, extent in zip(block, x.shape, strict=True))
    for i in range(-(-rows // r)):
        for j in range(-(-columns // c)):
            blocked = x[i * r : (i + 1) * r, j * c : (j + 1) * c]
            assert reduced[i, j] == getattr(torch, how)(blocked, dim=(0, 1))
    assert expand_blocks(reduced, block, x.shape).expand(x.shape).shape == x.shape


def test_refusals_say_what_is_needed():
    with pytest.raises(ValueError, match=r"got shape \(3,\), needs two dimensions"):
        quantize(torch.zeros(3), TensorSpec(E4M3, (1, 128)))
    with pytest.raises(ValueError, match=r"scale \(1, 1\), needs \(2, 2\)"):
        quantize(torch.zeros(2, 200), TensorSpec(E4M3, (1, 128)), torch.ones(1, 1))
    with pytest.raises(ValueError, match="loses most codes"):
        TensorSpec(INT4, (1, -1))
    with pytest.raises(ValueError, match="zero point needs an integer format"):
        TensorSpec(E4M3, (1, 128), symmetric=False)
    with pytest.raises(ValueError, match="two extents"):
        TensorSpec(E4M3, (0, 128))
