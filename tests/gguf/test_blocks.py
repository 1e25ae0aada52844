"""ggml blocks hold codes and scales bit by bit."""

import gguf
import numpy as np
import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import Q1_0, Q2_0, Q4_0, Q5_0, Q8_0, decode, encode, exact_type, projection
from lightning_gsq.gguf.types.codec import dequantize
from lightning_gsq.gguf.types.table import GgmlType
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.weights import random_tensor


@pytest.mark.parametrize(
    ("bits", "group_size", "columns", "expected"),
    [
        (1, 128, 256, Q1_0),
        (1, 128, 576, Q2_0),  # 576 is no multiple of 128
        (1, -1, 256, Q1_0),
        (1, 32, 256, Q4_0),
        ("ternary", 64, 576, Q2_0),
        (2, 64, 576, Q2_0),
        (2, 32, 576, Q4_0),
        (2, 256, 320, Q2_0),  # the last group is shorter, and still whole blocks
        (2, 16, 576, None),
        (3, 64, 576, Q4_0),
        (3, 48, 576, None),
        (4, 32, 576, Q4_0),
        (4, -1, 96, Q4_0),
        (4, -1, 80, None),
        (5, 32, 64, Q5_0),
        (6, 64, 128, Q8_0),
        (8, 32, 64, Q8_0),
    ],
)
def test_exact_types_round_trip(bits: object, group_size: int, columns: int, expected: object) -> None:
    tensor = random_tensor(bits, group_size, columns)
    kind = exact_type(tensor.scheme, columns)
    assert kind is expected
    if kind is not None:
        raw = encode(tensor, kind)
        assert raw.shape == (6, kind.row_bytes(columns))
        assert torch.equal(dequantize(raw, kind.number), tensor.dequantize())


@pytest.mark.parametrize("kind", [Q4_0, Q5_0, Q8_0])
def test_the_gguf_package_reads_the_same_values(kind: GgmlType) -> None:
    tensor = random_tensor({"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}[kind.name], 64, 192)
    values = gguf.quants.dequantize(encode(tensor, kind), gguf.GGMLQuantizationType[kind.name])
    assert np.array_equal(values, tensor.dequantize().numpy())


def test_two_bit_block_by_hand() -> None:
    """fp16 -0.5, then element j in bits 2 (j % 4) of byte j / 4, as q = 1 - code."""
    codes = torch.zeros(1, 64, dtype=torch.int8)
    codes[0, :4] = torch.tensor([-2, -1, 0, 1])
    raw = encode(QuantizedTensor(codes, torch.tensor([[0.5]]).half(), QuantScheme(2, 64)), Q2_0)
    assert raw[0, :2].tobytes() == np.float16(-0.5).tobytes()
    assert raw[0, 2] == 3 | 2 << 2 | 1 << 4 | 0 << 6
    assert set(raw[0, 3:]) == {0b01010101}


def test_one_bit_block_by_hand() -> None:
    codes = -torch.ones(1, 128, dtype=torch.int8)
    codes[0, [0, 9]] = 1
    raw = encode(QuantizedTensor(codes, torch.tensor([[2.0]]).half(), QuantScheme(1, 128)), Q1_0)
    assert raw[0].tolist() == [0, 0x40, 1, 2, *[0] * 14]


def test_codes_and_scales_come_back() -> None:
    tensor = random_tensor(4, 32, 96)
    codes, scales = decode(encode(tensor, Q4_0), Q4_0)
    assert torch.equal(codes.to(torch.int8), tensor.codes_OI)
    assert torch.equal(scales, tensor.scales_OG)


def test_scales_that_are_no_fp16_numbers_are_refused() -> None:
    tensor = random_tensor(4, 32, 32)
    odd = QuantizedTensor(tensor.codes_OI, torch.full((6, 1), 0.1), tensor.scheme)
    with pytest.raises(ConfigurationError, match=r"--model\.scale_dtype float16"):
        encode(odd, Q4_0)


def test_a_type_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Q2_0 holds -1 \.\.\. 2"):
        encode(random_tensor(3, 64, 64), Q2_0)
    with pytest.raises(ValueError, match="rows of 18-byte Q4_0 blocks"):
        decode(np.zeros((1, 20), np.uint8), Q4_0)


def test_projection_is_close_but_not_exact() -> None:
    tensor = random_tensor(3, 16, 64)
    dense = tensor.dequantize()
    back = dequantize(projection(dense, Q8_0), Q8_0.number)
    assert 0 < float((back - dense).abs().max()) <= float(dense.abs().max()) / 127
