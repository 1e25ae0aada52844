"""A written file is the gguf package's to the byte, and llama.cpp reads what that package cannot write."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.file import Field, GGUFFile
from lightning_gsq.gguf.types.codec import dequantize
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.gguf.write import NewTensor, header, write_gguf
from tests.gguf.llama_cpp import Reader

FIELDS = {
    "b": Field(True, GGUFValueType.BOOL),
    "general.architecture": Field("llama", GGUFValueType.STRING),
    "numbers": Field([1, -3], GGUFValueType.ARRAY, GGUFValueType.INT32),
    "texts": Field(["a", "ä", ""], GGUFValueType.ARRAY, GGUFValueType.STRING),
    "flags": Field([True, False], GGUFValueType.ARRAY, GGUFValueType.BOOL),
    **{
        f"x.{kind.name}": Field(3, kind)
        for kind in (
            *(GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.UINT16, GGUFValueType.INT16),
            *(GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64, GGUFValueType.INT64),
        )
    },
    "x.f32": Field(0.1, GGUFValueType.FLOAT32),
    "x.f64": Field(0.1, GGUFValueType.FLOAT64),
}


def random(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_the_same_bytes_as_the_gguf_package(tmp_path: Path) -> None:
    arrays = {"norm": np.arange(5, dtype=np.float32), "half": np.ones((2, 3, 4), np.float16)}
    blocks = random((3, 2 * TYPES["Q4_K"].num_bytes))
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    for key, field in FIELDS.items():
        if key != "general.architecture":
            writer.add_key_value(key, field.value, field.kind, field.element)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = [
        NewTensor("q", (3, 512), TYPES["Q4_K"].number, lambda: blocks),
        NewTensor("norm", (5,), TYPES["F32"].number, lambda: arrays["norm"]),
        NewTensor("half", (2, 3, 4), TYPES["F16"].number, lambda: arrays["half"]),
    ]
    write_gguf(tmp_path / "ours.gguf", FIELDS, tensors)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_llama_cpp_reads_every_type_and_an_empty_list(tmp_path: Path) -> None:
    raws = {name: random((3, 2 * kind.num_bytes)) for name, kind in TYPES.items()}
    tensors = [
        NewTensor(name, (3, 2 * kind.length), kind.number, lambda name=name: raws[name])  # type: ignore[misc]
        for name, kind in TYPES.items()
    ]
    path = tmp_path / "x.gguf"
    fields = {**FIELDS, "none": Field([], GGUFValueType.ARRAY, GGUFValueType.STRING)}
    write_gguf(path, fields, tensors)
    content, theirs, ours = path.read_bytes(), Reader(path), GGUFFile(path)
    assert ours.fields == {
        **fields,
        "x.f32": Field(float(np.float32(0.1)), GGUFValueType.FLOAT32),
    }
    assert (theirs.text("general.architecture"), theirs.texts("texts"), theirs.texts("none")) == (
        "llama",
        ["a", "ä", ""],
        [],
    )
    assert [*theirs.tensors] == [*ours.tensors] == [*TYPES]
    for name, (number, offset, size) in theirs.tensors.items():
        assert (number, offset, size) == (
            TYPES[name].number,
            ours.tensors[name].offset,
            ours.tensors[name].num_bytes,
        )
        assert content[offset : offset + size] == raws[name].tobytes() == ours.raw(name).tobytes()


def test_mutated_files_of_every_type_are_read_or_refused(tmp_path: Path) -> None:
    """What is read lies inside of the file and has values; everything else is a ConfigurationError."""
    path, generator = tmp_path / "x.gguf", np.random.default_rng(0)
    tensors = [
        NewTensor(name, (2, kind.length), kind.number, lambda kind=kind: random((2, kind.num_bytes)))  # type: ignore[misc]
        for name, kind in TYPES.items()
    ]
    write_gguf(path, FIELDS, tensors)
    whole, head = path.read_bytes(), len(header(FIELDS, tensors))
    read = 0
    for _ in range(300):
        content = bytearray(whole if generator.random() < 0.8 else whole[: generator.integers(len(whole))])
        for place in generator.integers(0, head, generator.integers(1, 3)):
            if place < len(content):
                content[place] = generator.integers(256)
        path.write_bytes(content)
        try:
            file = GGUFFile(path)
        except ConfigurationError:
            continue
        for name, tensor in file.tensors.items():
            try:
                dense = dequantize(file.raw(name), tensor.number)
            except ConfigurationError as error:
                assert "holds no weights that can be read" in str(error)
            else:
                assert dense.numel() == np.prod(tensor.shape)
                read += 1
    assert read > 300


def test_wrong_content_is_refused(tmp_path: Path) -> None:
    tensor = NewTensor("q4", (3, 64), TYPES["Q4_0"].number, lambda: np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="q4 takes 108 bytes in the file, got 3"):
        write_gguf(tmp_path / "x.gguf", FIELDS, [tensor])
    with pytest.raises(ValueError, match="the list texts needs the type of its elements"):
        write_gguf(tmp_path / "x.gguf", {"texts": Field([], GGUFValueType.ARRAY)}, [])
