"""The quick reader of GGUF files reads what that of the ``gguf`` package reads, in the same parts."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter

from lightning_gsq.models.gguf_reader import QuickReader, quick_reader

ARRAYS = {kind: [3, 0, 1] for kind in GGUFReader.gguf_scalar_to_np} | {
    GGUFValueType.STRING: ["a", "", "ä of two bytes"]
}


@pytest.mark.parametrize("endian", GGUFEndian)
def test_the_same_parts(endian: GGUFEndian, tmp_path: Path) -> None:
    """Arrays of every kind, empty ones, numbers, texts, tensors."""
    file = tmp_path / "x.gguf"
    writer = GGUFWriter(file, "llama", endianess=endian)
    for kind, values in ARRAYS.items():
        for name, own in (("many", values), ("one", values[:1])):
            writer.add_key_value(f"{name}.{kind.name}", own, GGUFValueType.ARRAY, kind)
        writer.add_key_value(f"alone.{kind.name}", values[0], kind)
    writer.add_tensor("norm", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs, ours = GGUFReader(file), QuickReader(file)
    assert list(ours.fields) == list(theirs.fields) and len(theirs.fields) > 3 * len(ARRAYS)
    for name, field in theirs.fields.items():
        own = ours.fields[name]
        assert (own.offset, own.data, own.types) == (field.offset, field.data, field.types), name
        for one, other in zip(own.parts, field.parts, strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other), name
        assert own.contents() == field.contents(), name
    (tensor,), (own_tensor,) = theirs.tensors, ours.tensors
    assert tensor.name == own_tensor.name and np.array_equal(tensor.data, own_tensor.data)


def test_it_is_in_its_place_inside_alone() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with quick_reader():
        assert gguf.GGUFReader is QuickReader
        names = [gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) for _ in range(2)]
        assert names[0] is names[1] and names[0].mapping == before[1](gguf.MODEL_ARCH.LLAMA, 2).mapping
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
