"""Importance matrices lie in a file as llama.cpp lays them, and are read with its rules."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.file import Field
from lightning_gsq.gguf.imatrix import ImportanceMatrix, InputSquares, read_imatrix, write_imatrix
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.gguf.write import NewTensor, write_gguf
from tests.gguf.llama_cpp import Reader

DENSE, EXPERTS = "blk.0.ffn_down.weight", "blk.0.ffn_down_exps.weight"
MATRIX = ImportanceMatrix(
    {
        EXPERTS: InputSquares(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([2.0, 0.0])),
        DENSE: InputSquares(torch.tensor([[8.0, 4.0, 0.5, 0.0]]), torch.tensor([4.0])),
    },
    ("wiki.train.raw", "ü"),
    chunk_count=3,
    chunk_size=512,
)


def same(one: ImportanceMatrix, other: ImportanceMatrix) -> bool:
    values = all(
        torch.equal(one.entries[name].sum_EI, entry.sum_EI) and torch.equal(one.entries[name].count_E, entry.count_E)
        for name, entry in other.entries.items()
    )
    rest = [(m.datasets, m.chunk_count, m.chunk_size, set(m.entries)) for m in (one, other)]
    return values and rest[0] == rest[1]


def test_round_trip(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "x.gguf", MATRIX)
    assert same(read_imatrix(tmp_path / "x.gguf"), MATRIX)


def test_importance_is_the_mean_square_and_one_for_experts_without_tokens() -> None:
    assert MATRIX.entries[DENSE].mean().tolist() == [[2.0, 1.0, 0.125, 0.0]]
    assert MATRIX.entries[EXPERTS].mean().tolist() == [[0.5, 1.0, 1.5], [1.0, 1.0, 1.0]]


def test_layout_by_hand(tmp_path: Path) -> None:
    """No architecture; four fields; sums and counts of each weight, sorted by name; trailing ones left out."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def tensor(name: str, dimensions: tuple[int, ...], offset: int) -> bytes:
        count = len(dimensions)
        return text(name) + struct.pack(f"<I{count}QIQ", count, *dimensions, 0, offset)

    expected = b"GGUF" + struct.pack("<IQQ", 3, 4, 4)
    expected += text("general.type") + struct.pack("<I", 8) + text("imatrix")
    expected += text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 2) + text("wiki.train.raw") + text("ü")
    expected += text("imatrix.chunk_count") + struct.pack("<II", 4, 3)
    expected += text("imatrix.chunk_size") + struct.pack("<II", 4, 512)
    expected += tensor(f"{DENSE}.in_sum2", (4,), 0) + tensor(f"{DENSE}.counts", (1,), 32)
    expected += tensor(f"{EXPERTS}.in_sum2", (3, 2), 64) + tensor(f"{EXPERTS}.counts", (1, 2), 96)
    expected += bytes(-len(expected) % 32)
    for values in ([8, 4, 0.5, 0], [4], [1, 2, 3, 0, 0, 0], [2, 0]):
        data = np.array(values, "<f4").tobytes()
        expected += data + bytes(-len(data) % 32)
    write_imatrix(tmp_path / "x.gguf", MATRIX)
    assert (tmp_path / "x.gguf").read_bytes() == expected


def test_llama_cpp_reads_it(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "x.gguf", MATRIX)
    reader = Reader(tmp_path / "x.gguf")
    assert (reader.text("general.type"), reader.texts("imatrix.datasets")) == ("imatrix", ["wiki.train.raw", "ü"])
    assert (reader.number("imatrix.chunk_count"), reader.number("imatrix.chunk_size")) == (3, 512)
    assert {name: (number, size) for name, (number, _, size) in reader.tensors.items()} == {
        f"{DENSE}.in_sum2": (0, 16),
        f"{DENSE}.counts": (0, 4),
        f"{EXPERTS}.in_sum2": (0, 24),
        f"{EXPERTS}.counts": (0, 8),
    }


def test_sums_of_inputs_are_passed_over_and_missing_fields_are_none(tmp_path: Path) -> None:
    """Newer versions write ``in_sum`` too; others leave the description of the text out."""
    tensors = [plain("a.in_sum2", [1.0, 2.0]), plain("a.counts", [2.0]), plain("a.in_sum", [-1.0, 0.0])]
    write_gguf(tmp_path / "x.gguf", {"general.type": Field("imatrix", GGUFValueType.STRING)}, tensors)
    matrix = read_imatrix(tmp_path / "x.gguf")
    assert (matrix.datasets, matrix.chunk_count, matrix.chunk_size) == ((), 0, 0)
    assert {name: entry.mean().tolist() for name, entry in matrix.entries.items()} == {"a": [[0.5, 1.0]]}


def plain(name: str, values: list[float], kind: str = "F32") -> NewTensor:
    dtype = {"F32": np.float32, "F16": np.float16}[kind]
    return NewTensor(name, (len(values),), TYPES[kind].number, lambda: np.array(values, dtype))


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("model", [plain("a.in_sum2", [1.0])], r"of the type 'model', not 'imatrix'; make .* llama-imatrix -o x\.gguf"),
        ("imatrix", [plain("a", [1.0])], "not a whole importance matrix: there are no sums"),
        ("imatrix", [plain("a.in_sum2", [1.0])], "a has sums without counts"),
        ("imatrix", [plain("a.counts", [1.0])], "a has sums without counts or counts without sums"),
        ("imatrix", [plain("a.in_sum2", [1.0] * 3), plain("a.counts", [1.0] * 2)], "a has 3 sums for 2 counts"),
        ("imatrix", [plain("a.in_sum2", [1.0], "F16"), plain("a.counts", [1.0])], "ggml's type 1, expected F32"),
        ("imatrix", [plain("a.in_sum2", [-1.0]), plain("a.counts", [1.0])], "negative, infinite or NaN"),
        ("imatrix", [plain("a.in_sum2", [1.0]), plain("a.counts", [float("nan")])], "negative, infinite or NaN"),
    ],
)
def test_files_that_are_none(tmp_path: Path, kind: str, tensors: list[NewTensor], message: str) -> None:
    write_gguf(tmp_path / "x.gguf", {"general.type": Field(kind, GGUFValueType.STRING)}, tensors)
    with pytest.raises(ConfigurationError, match=message):
        read_imatrix(tmp_path / "x.gguf")


def test_fields_of_another_type(tmp_path: Path) -> None:
    fields = {
        "general.type": Field("imatrix", GGUFValueType.STRING),
        "imatrix.chunk_count": Field("three", GGUFValueType.STRING),
    }
    write_gguf(tmp_path / "x.gguf", fields, [plain("a.in_sum2", [1.0]), plain("a.counts", [1.0])])
    with pytest.raises(ConfigurationError, match=r"imatrix\.chunk_count is 'three', expected int"):
        read_imatrix(tmp_path / "x.gguf")


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "x.gguf", MATRIX)
    whole, generator = (tmp_path / "x.gguf").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        content = bytearray(whole[: generator.integers(len(whole) // 2, len(whole) + 1)])
        for place in generator.integers(0, len(content), generator.integers(0, 4)):
            content[place] = generator.integers(256)
        (tmp_path / "y.gguf").write_bytes(content)
        try:
            matrix = read_imatrix(tmp_path / "y.gguf")
        except ConfigurationError:
            refused += 1
        else:
            assert all(bool(torch.isfinite(entry.mean()).all()) for entry in matrix.entries.values())
    assert 100 < refused < 500


def test_what_is_no_matrix_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs an entry"):
        write_imatrix(tmp_path / "x.gguf", ImportanceMatrix({}, (), 0, 0))
    odd = ImportanceMatrix({"a": InputSquares(torch.ones(2, 3), torch.ones(3))}, (), 0, 0)
    with pytest.raises(ValueError, match=r"a: sums of shape \(2, 3\), counts of shape \(3,\)"):
        write_imatrix(tmp_path / "x.gguf", odd)
    assert not (tmp_path / "x.gguf").exists()


def test_a_file_of_the_old_form(tmp_path: Path) -> None:
    """Numbers are mean squares times the calls; what follows the entries may be missing."""
    entry = struct.pack("<i", 3) + b"abc" + struct.pack("<iiff", 4, 2, 2.0, 6.0)
    (tmp_path / "x.dat").write_bytes(struct.pack("<i", 1) + entry)
    matrix = read_imatrix(tmp_path / "x.dat")
    assert matrix.entries["abc"].mean().tolist() == [[0.5, 1.5]] and matrix.datasets == ()
    (tmp_path / "x.dat").write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 9, 2) + b"de")
    assert (read_imatrix(tmp_path / "x.dat").datasets, read_imatrix(tmp_path / "x.dat").chunk_count) == (("de",), 9)


def test_damaged_files_of_the_old_form_are_refused(tmp_path: Path) -> None:
    entry = struct.pack("<i", 3) + b"abc" + struct.pack("<iiff", 4, 2, 2.0, 6.0)
    whole = struct.pack("<i", 1) + entry
    for content in (whole[:-1], whole[4:], b"", struct.pack("<i", 2) + entry, whole[:-4] + struct.pack("<f", -1.0)):
        (tmp_path / "x.dat").write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"x\.dat"):
            read_imatrix(tmp_path / "x.dat")
