"""Streaming statistics equal those of all tokens at once, in any dtype and cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab_calib.observers import GROUP, ChannelObserver, ChannelStatistics, InputObserver


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 300), st.sampled_from(["float32", "bfloat16"])
)
def test_streaming_equals_all_at_once(rows, channels, dtype):
    x = torch.randn(sum(rows) + 1, channels, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    observer = InputObserver()
    for part in x.split([*rows, 1]):
        observer.update(part)
    wide = x.double()
    assert observer.tokens == len(x)
    assert torch.equal(observer.amax(), x.abs().amax(0).float())
    torch.testing.assert_close(observer.energy(), wide.square().sum(0), rtol=1e-5, atol=0)
    unit = torch.nn.functional.pad(wide / wide.norm(dim=1, keepdim=True), (0, -channels % GROUP)).unflatten(
        1, (-1, GROUP)
    )
    torch.testing.assert_close(observer.moments(), torch.einsum("tgi,tgj->gij", unit, unit), rtol=1e-5, atol=1e-6)


def test_energy_keeps_small_channels_beside_outliers():
    observer = ChannelObserver()
    x = torch.tensor([[3e4, 1e-3]])
    for _ in range(1000):
        observer.update(x)
    torch.testing.assert_close(observer.energy(), torch.tensor([9e11, 1e-3], dtype=torch.float64), rtol=1e-5, atol=0)


def test_statistics_by_group_of_128():
    observer = ChannelObserver()
    x = torch.ones(2, 200)
    x[0, 3], x[1, 150] = -5.0, 7.0
    observer.update(x)
    seen = ChannelStatistics.of(observer)
    assert seen.group_amax().tolist() == [5.0, 7.0]
    assert seen.outlier_ratio() == pytest.approx(7.0)
    assert seen.tokens == 2


def test_a_dead_token_and_a_dead_layer_leave_finite_statistics():
    observer = InputObserver()
    observer.update(torch.zeros(3, 128))
    assert observer.moments().isfinite().all()
    assert ChannelStatistics.of(observer).outlier_ratio() == 0.0
