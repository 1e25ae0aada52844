"""The ledger adds up."""

import pytest
import torch

from lightning_gsq.weights.grid import Bits
from lightning_gsq.weights.ledger import Ledger, LedgerEntry
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme


@pytest.mark.parametrize("columns", [1, 31, 64, 100])
@pytest.mark.parametrize("group_size", [-1, 7, 32])
@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, 7])
def test_an_entry_counts_every_stored_bit(bits: Bits, group_size: int, columns: int) -> None:
    scheme = QuantScheme(bits, group_size)
    tensor = QuantizedTensor(
        torch.full((5, columns), scheme.high, dtype=torch.int8),
        torch.ones(5, scheme.num_groups(columns)).half(),
        scheme,
    )
    entry = LedgerEntry.packed("w", (5, columns), scheme, 16)
    assert entry.bits == 8 * sum(part.nbytes for part in tensor.pack().values())
    assert entry.codes == 5 * columns * scheme.storage_bits
    assert entry.quantized and entry.weights == 5 * columns


def test_sums(tmp_path) -> None:  # type: ignore[no-untyped-def]
    entries = (
        LedgerEntry("a", 100, codes=200, scales=80, padding=40),
        LedgerEntry("b", 10, unquantized=160),
    )
    ledger = Ledger(entries, {"m.safetensors": 7})
    assert ledger.num_bytes == 25 + 10 + 5 + 20 + 7
    sums = ledger.summary()
    assert sums["bits_per_quantized_weight"] == pytest.approx(3.2)
    assert sums["bits_per_parameter"] == pytest.approx(8 * 67 / 110)
    assert sums["bytes"]["total"] == 67
    assert ledger.as_dict()["entries"]["a"] == {"weights": 100, "codes": 200, "scales": 80, "padding": 40}
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"x" * 67)
    ledger.verify([file])
    file.write_bytes(b"x" * 66)
    with pytest.raises(RuntimeError, match="counts 67 bytes"):
        ledger.verify([file])
