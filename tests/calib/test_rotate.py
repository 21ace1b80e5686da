"""Orthogonal matrices that spread: orthogonal in float64, entries of one size."""

from __future__ import annotations

import pytest
import torch

from quantlab_calib.rotate import hadamard


@pytest.mark.parametrize("size", [1, 2, 12, 64, 100, 128, 896, 1152])
def test_it_is_orthogonal(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 20, 28, 64, 76, 148, 384, 896])
def test_entries_are_of_one_size_where_a_hadamard_matrix_is_known(size):
    torch.testing.assert_close(hadamard(size).abs() * size**0.5, torch.ones(size, size, dtype=torch.float64))


def test_one_large_channel_is_spread_over_all():
    x = torch.zeros(896, dtype=torch.float64)
    x[17] = 100.0
    assert float((x @ hadamard(896)).abs().max()) == pytest.approx(100 / 896**0.5)


def test_the_seed_decides():
    assert torch.equal(hadamard(64, 1), hadamard(64, 1))
    assert not torch.equal(hadamard(64, 1), hadamard(64, 2))
