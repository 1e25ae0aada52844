"""GGUF files come back as they were written; damaged ones end in one kind of error."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import Q2_0, Q4_0
from lightning_gsq.gguf.file import BLOCK_SIZES, Field, GGUFFile
from lightning_gsq.gguf.write import NewTensor, write_gguf
from tests.gguf.llama_cpp import library

FIELDS = {
    "general.architecture": Field("llama", GGUFValueType.STRING),
    "llama.block_count": Field(2, GGUFValueType.UINT32),
    "llama.eps": Field(0.5, GGUFValueType.FLOAT32),
    "flag": Field(True, GGUFValueType.BOOL),
    "tokens": Field(["a", "ä", ""], GGUFValueType.ARRAY, GGUFValueType.STRING),
    "types": Field([1, -3], GGUFValueType.ARRAY, GGUFValueType.INT32),
}
ARRAYS = {
    "norm": np.arange(5, dtype=np.float32),
    "q4": np.arange(3 * 36, dtype=np.uint8).reshape(3, 36),
    "q2": np.arange(2 * 18, dtype=np.uint8).reshape(2, 18),
}
SHAPES = {"norm": ((5,), 0), "q4": ((3, 64), Q4_0.number), "q2": ((2, 64), Q2_0.number)}


def write(path: Path) -> Path:
    write_gguf(path, FIELDS, [NewTensor(n, *SHAPES[n], lambda a=a: a) for n, a in ARRAYS.items()])  # type: ignore[misc]
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


def test_round_trip(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path / "x.gguf"))
    assert file.fields == FIELDS
    assert {n: (t.shape, t.number) for n, t in file.tensors.items()} == SHAPES
    for name, array in ARRAYS.items():
        assert file.raw(name).tobytes() == array.tobytes()


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, FIELDS, [NewTensor("q4", *SHAPES["q4"], lambda: ARRAYS["q4"])])
    reader = gguf.GGUFReader(path)
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.shape.tolist(), tensor.tensor_type.name) == ("q4", [64, 3], "Q4_0")
    assert tensor.data.tobytes() == ARRAYS["q4"].tobytes()
    assert reader.fields["tokens"].contents() == ["a", "ä", ""]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"GGUX", "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "ends at byte 24"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "a name of"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "array of arrays"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**62), "texts"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 5, 2**62), "ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQ", 3, 1, 0, 1, b"t", 2, 33, 1) + struct.pack("<IQ", 2, 0), "whole blocks"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQ", 3, 1, 0, 1, b"t", 2, 32, 2**60) + struct.pack("<IQ", 2, 0), "its tensors"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 1, 0, 1, b"t", 1, 32) + struct.pack("<IQ", 2, 7), "off the alignment"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 1, 0, 1, b"t", 1, 32) + struct.pack("<IQ", 99, 0), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "9 dimensions"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header)
    with pytest.raises(ConfigurationError, match=message):
        GGUFFile(path)


def test_sizes_of_all_types_are_those_of_llama_cpp() -> None:
    assert {
        n: (library().ggml_blck_size(n), library().ggml_row_size(n, s[0])) for n, s in BLOCK_SIZES.items()
    } == BLOCK_SIZES


def test_empty_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    for name in ("x.gguf", "y.gguf"):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            GGUFFile(tmp_path / name)


@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(whole: bytes, tmp_path_factory: pytest.TempPathFactory, data) -> None:  # type: ignore[no-untyped-def]
    """Cut off anywhere, or with bytes replaced: never anything but a ConfigurationError or tensors inside the file."""
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)):
        if place < len(content):
            content[place] = value
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
    except ConfigurationError:
        return
    for name, tensor in file.tensors.items():
        assert tensor.offset + tensor.num_bytes <= len(content)
        assert file.raw(name).size == tensor.num_bytes


@settings(max_examples=500, deadline=None)
@given(content=st.binary(max_size=300))
@example(content=b"")
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + content)
    try:
        GGUFFile(path)
    except ConfigurationError:
        return
