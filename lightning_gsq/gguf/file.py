"""The GGUF container, read: key-values, a table of tensors, their bytes. See :mod:`lightning_gsq.gguf.write` too.

Reading is our own, because the ``gguf`` package's reader refuses files with a type it does not know (Q2_0), and because
a file from elsewhere is not to be trusted: every count, length, type and offset is checked against the file's size
before it is used, so that a truncated or hostile file ends in a :class:`ConfigurationError` and never in a large
allocation or in bytes outside of the file.

    magic, version, number of tensors, number of key-values
    key-values      key, type, value
    tensors         name, dimensions (the row length first), type, offset into the data
    data            aligned; each tensor at a multiple of the alignment
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
from gguf import GGUFValueType

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.types.table import TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_ALIGNMENT = 4, 65535, 1 << 16
BLOCK_SIZES = {
    **{int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()},
    **{kind.number: (kind.length, kind.num_bytes) for kind in TYPES.values()},
    int(gguf.GGMLQuantizationType.Q8_1): (32, 36),  # two fp16 numbers; the package counts two of fp32
}
"""Weights and bytes of a block, by the type's number."""
NUMBERS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class Field:
    """A value with its type in the file.

    Args:
        value: A number, a string, or a list of them.
        kind: The value's type.
        element: The elements' type, for an array.
    """

    value: Any
    kind: GGUFValueType
    element: GGUFValueType | None = None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Args:
        shape: Rows first, as in PyTorch: the reverse of the file's order.
        number: ggml's number of its type.
        offset: From the beginning of the file, in bytes.
        num_bytes: Its size.
    """

    shape: tuple[int, ...]
    number: int
    offset: int
    num_bytes: int


class GGUFFile:
    """A file that was read: its fields and where its tensors lie.

    Args:
        path: The file.

    Raises:
        ConfigurationError: it is truncated, damaged, or no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ConfigurationError(f"{path} cannot be read: {error}") from error
        cursor = _Cursor(path, self._bytes)
        self.fields, self.tensors = _read(cursor)

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes as uint8 ``rows, row bytes``; they stay on disk until they are used."""
        stored = self.tensors[name]
        data = self._bytes[stored.offset : stored.offset + stored.num_bytes]
        return data.reshape(math.prod(stored.shape[:-1]), -1)


class _Cursor:
    """A position in a file's bytes that never leaves them."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.position = path, memoryview(data.data), 0

    def fail(self, what: str) -> NoReturn:
        raise ConfigurationError(f"{self.path} is not a GGUF file that can be read: {what}")

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.position:
            self.fail(f"it ends at byte {len(self.data)}, inside of something that begins at {self.position}")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, kind: GGUFValueType) -> Any:
        form = NUMBERS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, limit: int | None = None) -> str:
        length = self.number(GGUFValueType.UINT64)
        if limit is not None and length > limit:
            self.fail(f"a name of {length} bytes")
        try:
            return bytes(self.take(length)).decode("utf-8")
        except UnicodeDecodeError:
            return self.fail(f"a text before byte {self.position} is not UTF-8")

    def kind(self) -> GGUFValueType:
        number = self.number(GGUFValueType.UINT32)
        try:
            return GGUFValueType(number)
        except ValueError:
            return self.fail(f"a value of the unknown type {number}")

    def value(self, kind: GGUFValueType) -> Any:
        return self.text() if kind == GGUFValueType.STRING else self.number(kind)

    def field(self) -> Field:
        kind = self.kind()
        if kind != GGUFValueType.ARRAY:
            return Field(self.value(kind), kind)
        element = self.kind()
        if element == GGUFValueType.ARRAY:
            self.fail("an array of arrays")
        count = self.number(GGUFValueType.UINT64)
        if element == GGUFValueType.STRING:
            if count > len(self.data) // 8:  # each has its length before it
                self.fail(f"an array of {count} texts")
            return Field([self.text() for _ in range(count)], kind, element)
        form = np.dtype(NUMBERS[element])
        return Field(np.frombuffer(self.take(count * form.itemsize), form).tolist(), kind, element)


def _read(cursor: _Cursor) -> tuple[dict[str, Field], dict[str, StoredTensor]]:
    if bytes(cursor.take(4)) != MAGIC:
        cursor.fail("it does not begin with GGUF")
    version = cursor.number(GGUFValueType.UINT32)
    if version not in VERSIONS:
        cursor.fail(f"version {version}; versions 2 and 3, little-endian, are read")
    num_tensors, num_fields = cursor.number(GGUFValueType.UINT64), cursor.number(GGUFValueType.UINT64)
    fields: dict[str, Field] = {}
    for _ in range(num_fields):  # a wrong count ends at the end of the file: each field takes some bytes
        key = cursor.text(MAX_NAME_BYTES)
        if key in fields:
            cursor.fail(f"the key {key!r} twice")
        fields[key] = cursor.field()
    alignment = fields.get("general.alignment", Field(gguf.GGUF_DEFAULT_ALIGNMENT, GGUFValueType.UINT32)).value
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.fail(f"an alignment of {alignment!r}")
    entries = {}
    for _ in range(num_tensors):
        name, entry = _tensor_entry(cursor)
        if name in entries:
            cursor.fail(f"the tensor {name!r} twice")
        entries[name] = entry
    begin = -(-cursor.position // alignment) * alignment
    placed = {
        name: StoredTensor(entry.shape, entry.number, begin + entry.offset, entry.num_bytes)
        for name, entry in entries.items()
    }
    end = begin
    for name, stored in sorted(placed.items(), key=lambda item: item[1].offset):
        if stored.offset < end or (stored.offset - begin) % alignment:
            cursor.fail(f"the tensor {name!r} begins at byte {stored.offset}, inside of another or off the alignment")
        end = stored.offset + stored.num_bytes
    if end > len(cursor.data):
        cursor.fail(f"it ends at byte {len(cursor.data)}, its tensors at {end}")
    return fields, placed


def _tensor_entry(cursor: _Cursor) -> tuple[str, StoredTensor]:
    name = cursor.text(MAX_NAME_BYTES)
    dimensions = cursor.number(GGUFValueType.UINT32)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        cursor.fail(f"the tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.number(GGUFValueType.UINT64) for _ in range(dimensions))[::-1]
    number, offset = cursor.number(GGUFValueType.UINT32), cursor.number(GGUFValueType.UINT64)
    if number not in BLOCK_SIZES:
        cursor.fail(f"the tensor {name!r} has the unknown type {number}")
    length, size = BLOCK_SIZES[number]
    if min(shape) < 1 or shape[-1] % length:
        cursor.fail(f"the tensor {name!r} of shape {shape} is no whole blocks of {length}")
    return name, StoredTensor(shape, number, offset, math.prod(shape) // length * size)
