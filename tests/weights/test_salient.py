"""Both layouts survive packing bit for bit, and the ledger counts what is packed."""

import dataclasses
import itertools

import pytest
import torch

from lightning_gsq.quantizers.dual_mode import quantize_elements
from lightning_gsq.saliency.budget import mixed_bits, planned_ledger
from lightning_gsq.saliency.scores import magnitude_score, salient_mask
from lightning_gsq.weights.mixed import merge_columns, other_columns
from lightning_gsq.weights.quantized import BitsLedger, QuantizedTensor, QuantizedWeight
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.stored import unpack_weight
from tests.support.weights import mixed_case


def _element(groups: int, bits: int, ratio: float) -> QuantizedWeight:
    w_OI = torch.randn(12, 45)
    mask_OI = salient_mask(magnitude_score(w_OI), ratio)
    part = SalientPart("element", bits, int(mask_OI.sum()) / mask_OI.numel(), scale_groups=groups)
    return quantize_elements(w_OI, mask_OI, QuantScheme(1, 64, part), torch.float16)


CASES = [
    *(case for case in itertools.product([1, "ternary", 2], [2, 3], [31, 100], [0, 1, 7], [None, 1, 5])),
]


@pytest.mark.parametrize(("bits", "salient_bits", "columns", "count", "table"), CASES)
def test_structured(bits: object, salient_bits: int, columns: int, count: int, table: int | None) -> None:
    tensor = mixed_case(bits, salient_bits, columns, count, table)
    _check(tensor)
    assert mixed_bits(5, columns, tensor.scheme) == BitsLedger.of(tensor).total_bits
    assert planned_ledger(5, columns, tensor.scheme).total_bits == BitsLedger.of(tensor).total_bits


@pytest.mark.parametrize(("groups", "bits", "ratio"), itertools.product([1, 2, 5, 8], [2, 4, 8], [0.0, 0.02, 0.4]))
def test_element(groups: int, bits: int, ratio: float) -> None:
    tensor = _element(groups, bits, ratio)
    _check(tensor)
    assert tensor.ledger().total_bits <= planned_ledger(12, 45, tensor.scheme).total_bits + 4 * 32  # whole words


def _check(tensor: QuantizedWeight) -> None:
    packed = tensor.pack()
    again = unpack_weight(packed, tensor.scheme, tensor.shape)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert {k: v.tolist() for k, v in again.pack().items()} == {k: v.tolist() for k, v in packed.items()}
    assert BitsLedger.of(tensor).num_bytes == sum(part.nbytes for part in packed.values())
    assert again.cpu().shape == tensor.shape


def test_columns_come_back_in_order() -> None:
    w_OI, columns_K = torch.randn(3, 9), torch.tensor([2, 3, 8])
    rest_R = other_columns(columns_K, 9)
    assert torch.equal(merge_columns(w_OI[:, rest_R], w_OI[:, columns_K], columns_K), w_OI)


def test_group_numbers_cost_more_than_the_signs() -> None:
    """The published layout with 8 groups: 3 bits a weight say which group, 1 bit is the sign."""
    ledger = _element(8, 4, 0.02).ledger().per_weight()
    assert ledger["positions"] > 2.9 > 1.2 > ledger["codes"]


@pytest.mark.parametrize("name", ["columns", "codes", "salient_codes", "members", "table"])
def test_missing_and_foreign_parts(name: str) -> None:
    tensor = mixed_case(1, 3, 40, 6, 5)
    packed = tensor.pack()
    with pytest.raises(ValueError, match="stored as"):
        unpack_weight({k: v for k, v in packed.items() if k != name}, tensor.scheme, tensor.shape)
    with pytest.raises(ValueError, match="stored as"):
        unpack_weight({**packed, "more": packed[name]}, tensor.scheme, tensor.shape)


def test_damaged_parts() -> None:
    tensor = mixed_case(1, 3, 40, 6, 5)
    packed = tensor.pack()
    with pytest.raises(ValueError, match="salient columns of 40"):
        unpack_weight({**packed, "columns": torch.zeros_like(packed["columns"])}, tensor.scheme, tensor.shape)
    with pytest.raises(ValueError, match="beyond the 5 of the table"):
        unpack_weight({**packed, "members": torch.full_like(packed["members"], -1)}, tensor.scheme, tensor.shape)
    with pytest.raises(ValueError, match="table of 5 scales"):
        unpack_weight({**packed, "table": packed["table"][:3]}, tensor.scheme, tensor.shape)
    plain = QuantizedTensor(torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 1), QuantScheme(1, -1))
    with pytest.raises(ValueError, match="stored as"):
        unpack_weight({**plain.pack(), "columns": packed["columns"]}, plain.scheme, (2, 4))


def test_admits() -> None:
    chosen = mixed_case(1, 3, 40, 6, 5).scheme
    asked = QuantScheme(1, 8, SalientPart("structured", 3, 0.14, scale_groups=5))
    assert asked.admits(chosen) and QuantScheme(1, budget=1.5).admits(chosen)
    assert not QuantScheme(1, 8).admits(chosen) and not QuantScheme(2, budget=2.5).admits(chosen)
    assert not dataclasses.replace(asked, group_size=16).admits(chosen)
    assert not asked.admits(QuantScheme(1, 8))
