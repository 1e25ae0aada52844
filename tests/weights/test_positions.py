"""Positions of salient weights: exact for any mask, and never much more than their entropy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gsq.weights.positions import decode_positions, encode_positions


@given(st.integers(1, 6), st.integers(1, 70), st.floats(0, 1), st.integers(0, 2**31))
def test_round_trip(rows: int, columns: int, ratio: float, seed: int) -> None:
    mask_OI = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < ratio
    width, words = encode_positions(mask_OI)
    assert torch.equal(decode_positions(width, words, (rows, columns), int(mask_OI.sum())), mask_OI)


def test_long_gaps() -> None:
    mask_OI = torch.zeros(50, 1000, dtype=torch.bool)
    mask_OI[0, 0] = mask_OI[31, 7] = mask_OI[49, 999] = True
    width, words = encode_positions(mask_OI)
    assert width > 0 and words.nbytes < 1000
    assert torch.equal(decode_positions(width, words, (50, 1000), 3), mask_OI)


@pytest.mark.parametrize("ratio", [0.001, 0.005, 0.02, 0.1, 0.5])
def test_close_to_the_entropy(ratio: float) -> None:
    mask_OI = torch.rand(400, 500) < ratio
    entropy = -(ratio * math.log2(ratio) + (1 - ratio) * math.log2(1 - ratio))
    _, words = encode_positions(mask_OI)
    assert 8 * words.nbytes / mask_OI.numel() < 1.25 * entropy + 0.025


def test_bitmap_where_it_is_cheaper() -> None:
    assert encode_positions(torch.rand(20, 50) < 0.5)[0] == 0


def test_damaged_positions() -> None:
    mask_OI = torch.rand(20, 50) < 0.02
    width, words = encode_positions(mask_OI)
    with pytest.raises(ValueError, match="positions"):
        decode_positions(width, words, (20, 50), int(mask_OI.sum()) + 400)
    with pytest.raises(ValueError, match="positions"):
        decode_positions(width, words, (1, 7), int(mask_OI.sum()))
