"""The packed ops against the dense weight, in float64."""

import pytest
import torch

from lightning_gsq.ops.packed_linear.reference import dequantize_packed_reference
from lightning_gsq.qtensor import QuantizedTensor
from lightning_gsq.scheme import Bits, QuantScheme

WIDTHS: tuple[Bits, ...] = (1, "ternary", 2, 3, 4, 5, 6, 7, 8)
SHAPES = [(5, 64, 32), (3, 100, 32), (4, 352, 128), (2, 70, -1), (3, 33, 64)]
"""Rows, columns, group size: whole, ragged in words, ragged in groups, one scale a row, less than a group."""


def make(bits: Bits, rows: int, columns: int, group_size: int) -> QuantizedTensor:
    scheme = QuantScheme(bits, group_size)
    levels = torch.tensor(scheme.levels, dtype=torch.int8)
    codes = levels[torch.randint(len(levels), (rows, columns))]
    return QuantizedTensor(codes, torch.randn(rows, scheme.num_groups(columns)), scheme)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_dequantizes_exactly(bits: Bits, shape: tuple[int, int, int]) -> None:
    weight = make(bits, *shape)
    packed = weight.pack()
    got = dequantize_packed_reference(
        packed["codes"],
        packed["scales"],
        bits=weight.scheme.storage_bits,
        in_features=shape[1],
        group_length=weight.scheme.group_length(shape[1]),
        dtype=torch.float32,
    )
    assert torch.equal(got, weight.dequantize())
