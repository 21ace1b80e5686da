"""INT4 words: the layout of compressed-tensors, and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab_kernels.packing import pack_int4, unpack_int4


@given(st.integers(0, 9), st.integers(0, 70), st.integers(0, 2**31))
def test_unpack_inverts_pack(rows: int, columns: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    words = pack_int4(codes)
    assert words.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_int4(words, columns), codes)


def test_lowest_nibble_first_offset_by_eight():
    codes = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, 4, 5]], dtype=torch.int8)
    expected = [0x0 | 0x1 << 4 | 0x8 << 8 | 0xF << 12 | 0x9 << 16 | 0xA << 20 | 0xB << 24 | 0xC << 28, 0x8888888D]
    assert [word % 2**32 for word in pack_int4(codes)[0].tolist()] == expected


def test_refusals_say_what_was_given():
    with pytest.raises(ValueError, match="int8 with two dimensions"):
        pack_int4(torch.zeros(8, dtype=torch.int8))
    with pytest.raises(ValueError, match="from 0 to 8, needs -8 to 7"):
        pack_int4(torch.tensor([[0, 8]], dtype=torch.int8))
    with pytest.raises(ValueError, match=r"needs int32 \[N, 2\]"):
        unpack_int4(torch.zeros(1, 1, dtype=torch.int32), 9)
