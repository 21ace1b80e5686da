"""Rounding to INT4: the grid of scales, the search, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab_calib.rounding import (
    CLIPS,
    FLOOR,
    GROUP,
    decode_int4,
    nearest_codes,
    on_grid,
    round_int4,
    search_scales,
)

seeds = st.integers(0, 2**31)


def by_vllm(scale: torch.Tensor) -> torch.Tensor:
    """Group scales [N, G] after vLLM's conversion to FP8 group scales and FP32 row factors."""
    factor = torch.maximum(scale.amax(dim=1, keepdim=True) / 448, torch.tensor(FLOOR))
    numbers = (scale / factor).to(torch.float8_e4m3fn).float()
    return (numbers / 8).to(torch.float8_e4m3fn).float() * (8 * factor)


def weights(seed: int, rows: int = 24, groups: int = 5) -> torch.Tensor:
    """Rows and groups of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * GROUP, generator=generator)
    weight *= 10 ** (torch.rand(rows, groups, generator=generator) * 6 - 4).repeat_interleave(GROUP, dim=1)
    return weight


@settings(max_examples=20)
@given(seeds)
def test_scales_survive_the_conversion_of_vllm(seed: int) -> None:
    scale = search_scales(weights(seed))
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    kept = by_vllm(scale)
    ordinary = scale.amax(dim=1) > 448 * FLOOR
    assert bool(ordinary.any())
    assert torch.equal(kept[ordinary], scale[ordinary])
    torch.testing.assert_close(kept, scale, rtol=2**-8, atol=0)  # the rest: tiny rows, on vLLM's smallest factor


@settings(max_examples=20)
@given(seeds)
def test_a_scale_on_the_grid_stays(seed: int) -> None:
    scale = on_grid(weights(seed).unflatten(1, (-1, GROUP)).abs().amax(dim=2))
    assert torch.equal(on_grid(scale), scale)


@pytest.mark.parametrize(("importance", "power"), [(None, 4), (torch.ones(512), 2)], ids=["free", "informed"])
def test_the_search_beats_scales_that_fit(importance: torch.Tensor | None, power: int) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, scale = round_int4(weight, importance=importance)
    fits = on_grid(weight.unflatten(1, (-1, GROUP)).abs().amax(dim=2) / 7)
    plain = decode_int4(nearest_codes(weight, fits), fits)
    found = decode_int4(codes, scale)
    assert (found - weight).abs().pow(power).sum() < 0.86 * (plain - weight).abs().pow(power).sum()
    assert (found - weight).square().sum() < 0.95 * (plain - weight).square().sum()
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == 7


def test_without_data_no_group_wants_a_smaller_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight far above the others is what asks for the smallest: its own error rises with the fourth power."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).pow(3)
    weight[:, ::128] = weight.abs().amax(dim=1, keepdim=True) * torch.linspace(1, 30, 64)[:, None]
    few = search_scales(weight)
    monkeypatch.setattr("quantlab_calib.rounding.FREE_CLIPS", CLIPS)
    assert torch.equal(few, search_scales(weight))


def test_important_channels_get_smaller_errors() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    importance = torch.ones(256)
    importance[::64] = 1000.0
    plain, weighted = (decode_int4(*round_int4(weight, importance=i)) for i in (None, importance))
    errors = [(found - weight).square()[:, ::64].sum() for found in (plain, weighted)]
    assert errors[1] < 0.7 * errors[0]


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(3).to(torch.bfloat16)
    whole = round_int4(weight)
    monkeypatch.setattr("quantlab_calib.rounding.CHUNK", {"cpu": 7 * weight.shape[1], "cuda": 1})
    for a, b in zip(round_int4(weight), whole, strict=True):
        assert torch.equal(a, b)


def test_zeros_stay_zero() -> None:
    weight = torch.zeros(4, 256)
    weight[0, 0] = 1.0
    codes, scale = round_int4(weight)
    assert decode_int4(codes, scale)[1:].count_nonzero() == 0
    assert bool((scale > 0).all())
    assert decode_int4(codes, scale)[0, 0] == pytest.approx(1.0, rel=0.07)


def test_ragged_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 200\): needs \[N, K\] with K a multiple of the group of 128"):
        round_int4(torch.zeros(4, 200))
