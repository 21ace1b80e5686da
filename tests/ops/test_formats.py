"""Number formats, bit for bit: every code, every tie, the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab_kernels.formats import E4M3, E5M2, FORMATS, INT4, INT8


def e4m3_value(code: int) -> float:
    """The definition of E4M3 (OCP FP8): bias 7, subnormals, no infinities; mantissa 7 of exponent 15 is NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


FINITE = sorted({e4m3_value(code) for code in range(256) if not math.isnan(e4m3_value(code))})


def cast(value: float) -> float:
    return float(E4M3.cast(torch.tensor([value], dtype=torch.float64)).float())


def test_every_e4m3_code_decodes_and_casts_back():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        values = E4M3.decode(codes, dtype).double()
        expected = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float64)
        assert torch.equal(values.nan_to_num(999.0), expected.nan_to_num(999.0)), dtype
    finite = ~codes.float().isnan()
    back = E4M3.cast(codes.float())
    assert torch.equal(back.view(torch.uint8)[finite], codes.view(torch.uint8)[finite])
    assert back.float()[~finite].isnan().all()


@pytest.mark.parametrize("low", range(len(FINITE) - 1))
def test_e4m3_ties_go_to_even_and_neighbours_to_the_nearest(low: int):
    below, above = FINITE[low], FINITE[low + 1]
    tie = (below + above) / 2
    even = min((below, above), key=lambda v: int(E4M3.cast(torch.tensor([v])).view(torch.uint8)) & 1)
    assert cast(tie) == even
    assert cast(float(torch.nextafter(torch.tensor(tie), torch.tensor(-1e9)))) == below
    assert cast(float(torch.nextafter(torch.tensor(tie), torch.tensor(1e9)))) == above


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (448.0, 448.0), (449.0, 448.0), (464.0, 448.0), (1e30, 448.0), (math.inf, 448.0), (-math.inf, -448.0),
        (2.0**-9, 2.0**-9),  # the smallest subnormal
        (2.0**-10, 0.0),  # half of it: to even, which is 0
        (1.5 * 2.0**-9, 2.0**-8),  # between 1 and 2 units: to even, which is 2
        (1.0 + 2.0**-30, 1.0),  # float64 input is rounded to float32 first
    ],
)  # fmt: skip
def test_e4m3_saturates_and_keeps_subnormals(value: float, expected: float):
    assert cast(value) == expected


def test_e4m3_keeps_nan_and_the_sign_of_zero():
    assert math.isnan(cast(math.nan))
    assert math.copysign(1, cast(-0.0)) == -1


@given(st.floats(width=32, allow_nan=False))
def test_e4m3_is_the_nearest_value(value: float):
    found = cast(value)
    clamped = max(-448.0, min(448.0, value))
    assert abs(found - clamped) == min(abs(v - clamped) for v in FINITE)
    assert cast(found) == found


@pytest.mark.parametrize(("format", "low", "high"), [(INT8, -128, 127), (INT4, -8, 7)])
def test_integers_round_to_even_saturate_and_send_nan_to_zero(format, low: int, high: int):
    x = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.5, 1e9, -1e9, math.inf, -math.inf, math.nan])
    assert format.cast(x).tolist() == [0, 2, 0, -2, 2, high, low, high, low, 0]
    every = torch.arange(low, high + 1, dtype=torch.int8)
    assert torch.equal(format.cast(format.decode(every)), every)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_registered_format_describes_itself(format):
    assert FORMATS[format.name] is format
    assert float(format.cast(torch.tensor([1e30])).float()) == format.max
    assert float(format.cast(torch.tensor([-1e30])).float()) == format.min
    assert E5M2.max == torch.finfo(torch.float8_e5m2).max
