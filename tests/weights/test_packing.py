"""Packing is exact for every width, also where values straddle words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gsq.weights.packing import pack, packed_words, unpack
from lightning_gsq.weights.quantized import BitsLedger, QuantizedTensor, expand_groups, reduce_groups
from lightning_gsq.weights.scheme import QuantScheme

SCHEMES = [1, "ternary", 2, 3, 4, 5, 6, 7, 8]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 130), seed=st.integers(0, 1000))
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    words = pack(values, bits)
    assert words.shape == (rows, packed_words(columns, bits))
    assert torch.equal(unpack(words, bits, columns), values.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_a_little_endian_bit_stream(bits: int) -> None:
    """Element i starts at bit i * bits: checked with Python's integers, which know no words."""
    values = torch.randint(0, 2**bits, (1, 50))
    stream = sum(int(v) << (i * bits) for i, v in enumerate(values[0]))
    words = pack(values, bits)[0].numpy().astype(np.uint32)
    assert [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(words))] == words.tolist()


def test_three_bit_values_that_straddle_words() -> None:
    values = torch.zeros(1, 43, dtype=torch.uint8)
    values[0, [10, 21, 42]] = 7  # bits 30-32, 63-65, 126-128
    words = pack(values, 3)[0].numpy().astype(np.uint32)
    assert words.tolist() == [0b11 << 30, 1 | 1 << 31, 0b11, 0b11 << 30, 1]


def test_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"0 \.\.\. 3 to be packed in 2 bits, got 0 \.\.\. 4"):
        pack(torch.tensor([[0, 4]]), 2)


def test_words_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(O, 2\) for 20 values of 3 bits"):
        unpack(torch.zeros(1, 3, dtype=torch.int32), 3, 20)


@pytest.mark.parametrize("bits", SCHEMES)
@pytest.mark.parametrize("columns", [1, 31, 64, 100])
def test_quantized_tensor_round_trip(bits: object, columns: int) -> None:
    scheme = QuantScheme(bits, 16)  # type: ignore[arg-type]
    codes = torch.tensor(scheme.grid.levels, dtype=torch.int8)[torch.randint(len(scheme.grid.levels), (5, columns))]
    tensor = QuantizedTensor(codes, torch.randn(5, scheme.num_groups(columns)).half(), scheme)
    again = QuantizedTensor.unpack(tensor.pack(), scheme, (5, columns))
    assert torch.equal(again.codes_OI, codes)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    ledger = BitsLedger.of(tensor)
    assert ledger.num_bytes == sum(part.nbytes for part in tensor.pack().values())


def test_dequantize_by_hand() -> None:
    scheme = QuantScheme(2, 2)
    tensor = QuantizedTensor(torch.tensor([[-2, 1, 0]], dtype=torch.int8), torch.tensor([[0.5, -3.0]]), scheme)
    assert tensor.dequantize().tolist() == [[-1.0, 0.5, 0.0]]


def test_unused_ternary_code_is_refused() -> None:
    words = {"codes": pack(torch.zeros(1, 4, dtype=torch.uint8), 2), "scales": torch.ones(1, 1)}
    with pytest.raises(ValueError, match="below the lowest level -1"):
        QuantizedTensor.unpack(words, QuantScheme("ternary", -1), (1, 4))


@pytest.mark.parametrize("columns", [6, 7])
def test_group_helpers_agree(columns: int) -> None:
    s_OG, x_OI = (
        torch.randn(2, -(-columns // 3), dtype=torch.double),
        torch.randn(2, columns, dtype=torch.double),
    )
    expanded = expand_groups(s_OG, columns, 3)
    torch.testing.assert_close((expanded * x_OI).sum(), (s_OG * reduce_groups(x_OI, 3)).sum())
