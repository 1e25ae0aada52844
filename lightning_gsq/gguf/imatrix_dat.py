"""llama.cpp's importance matrices in their older form (``.dat``), which programs still hand around; only read.

Little-endian: the number of entries; for each the length of its name, the name, how often it was called, how many
numbers follow, fp32 numbers; at the end, where it is there, the number of chunks, the length of a text's name, and the
name. A number is the mean square of a column times the calls; the columns of fused experts follow one another.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError

Entry = tuple[Tensor, float]
"""Sums, fp32 of all columns, and what to divide them by."""
LONGEST_NAME = 4096


def read_dat(content: bytes, path: object) -> tuple[dict[str, Entry], str, int]:
    """What a file says.

    Args:
        content: Its bytes.
        path: Its name, for messages.

    Returns:
        Its entries by name, the name of the text, the number of chunks.

    Raises:
        ConfigurationError: it is no such file, or it is damaged.
    """
    reader, entries = _Reader(content, f"{path} is no importance matrix, in neither form, or it is damaged"), {}
    for _ in range(reader.count("entries")):
        name = reader.text()
        calls = reader.count(f"calls of {name}")
        values = reader.floats(reader.count(f"numbers of {name}"))
        if not len(values) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ConfigurationError(f"{path}: {name} has no numbers, or a negative, infinite or NaN one")
        entries[name] = (values, float(calls))
    if reader.rest < 8:  # files of the first programs end here
        return entries, "", 0
    chunks = reader.count("chunks")
    return entries, reader.text(), chunks


class _Reader:
    """Goes through the bytes, and refuses what they cannot hold."""

    def __init__(self, content: bytes, refusal: str) -> None:
        self.content, self.refusal, self.position = content, refusal, 0

    @property
    def rest(self) -> int:
        """Bytes that were not read yet."""
        return len(self.content) - self.position

    def take(self, count: int) -> bytes:
        """So many bytes."""
        if count > self.rest:
            raise ConfigurationError(f"{self.refusal}: it ends early")
        self.position += count
        return self.content[self.position - count : self.position]

    def count(self, what: str) -> int:
        """A number that is not negative."""
        number = int(struct.unpack("<i", self.take(4))[0])
        if number < 0 or (what == "entries" and number == 0):
            raise ConfigurationError(f"{self.refusal}: {number} {what}")
        return number

    def text(self) -> str:
        """A length and so many bytes of UTF-8."""
        length = self.count("characters")
        if length > LONGEST_NAME:
            raise ConfigurationError(f"{self.refusal}: a name of {length} characters")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise ConfigurationError(f"{self.refusal}: a name is not UTF-8") from None

    def floats(self, count: int) -> Tensor:
        """So many fp32 numbers."""
        return torch.from_numpy(np.frombuffer(self.take(4 * count), "<f4").astype(np.float32))
