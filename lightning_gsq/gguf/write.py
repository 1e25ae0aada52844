"""Writing a GGUF file (:mod:`lightning_gsq.gguf.file` says what lies in it), one tensor in memory at a time.

It is our own because the ``gguf`` package's writer knows no Q2_0, writes no empty list, and puts an architecture into
files that have none, such as importance matrices. Files with what it can write are the same to the byte.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

from lightning_gsq.gguf.file import BLOCK_SIZES, MAGIC, NUMBERS, Field

VERSION = 3
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
ARCHITECTURE = "general.architecture"


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    Args:
        name: Its name in the file.
        shape: Rows first.
        number: ggml's number of its type.
        content: Makes its bytes, as an array of any shape; called once, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    number: int
    content: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        length, size = BLOCK_SIZES[self.number]
        return math.prod(self.shape) // length * size

    @property
    def padded_bytes(self) -> int:
        """The same with what lies before the next tensor."""
        return self.num_bytes + -self.num_bytes % ALIGNMENT


def write_gguf(path: Path, fields: Mapping[str, Field], tensors: Iterable[NewTensor]) -> None:
    """Writes a file.

    Args:
        path: The file.
        fields: Its key-values, in their order; an architecture comes first.
        tensors: In the order in which they are to lie in the file.

    Raises:
        ValueError: a tensor's bytes are more or fewer than its type and shape say.
    """
    tensors = list(tensors)
    with path.open("wb") as file:
        file.write(_padded(header(fields, tensors)))
        for tensor in tensors:
            content = np.ascontiguousarray(tensor.content())
            if content.nbytes != tensor.num_bytes:
                raise ValueError(f"{tensor.name} takes {tensor.num_bytes} bytes in the file, got {content.nbytes}")
            file.write(content.reshape(-1).view(np.uint8).data)
            file.write(bytes(-tensor.num_bytes % ALIGNMENT))


def file_size(fields: Mapping[str, Field], tensors: Iterable[NewTensor]) -> int:
    """Bytes of the file that :func:`write_gguf` writes; no content is made."""
    tensors = list(tensors)
    return len(_padded(header(fields, tensors))) + sum(tensor.padded_bytes for tensor in tensors)


def header(fields: Mapping[str, Field], tensors: Iterable[NewTensor]) -> bytes:
    """What lies before the tensors' bytes, without the padding after it."""
    tensors = list(tensors)
    ordered = sorted(fields.items(), key=lambda item: item[0] != ARCHITECTURE)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(ordered))]
    for key, field in ordered:
        parts += [_text(key), struct.pack("<I", field.kind), _value_bytes(key, field)]
    offset = 0
    for tensor in tensors:
        dimensions = len(tensor.shape)
        numbers = (dimensions, *reversed(tensor.shape), tensor.number, offset)
        parts += [_text(tensor.name), struct.pack(f"<I{dimensions}QIQ", *numbers)]
        offset += -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _value_bytes(key: str, field: Field) -> bytes:
    if field.kind != GGUFValueType.ARRAY:
        return _scalar_bytes(field.value, field.kind)
    if field.element is None:
        raise ValueError(f"the list {key} needs the type of its elements")
    head = struct.pack("<IQ", field.element, len(field.value))
    return head + b"".join(_scalar_bytes(value, field.element) for value in field.value)


def _scalar_bytes(value: Any, kind: GGUFValueType) -> bytes:
    return _text(value) if kind == GGUFValueType.STRING else struct.pack(NUMBERS[kind], value)


def _text(value: str) -> bytes:
    content = value.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % ALIGNMENT)
