"""The ``gguf`` package's reader, which transformers uses for some architectures, without its slowness.

It takes an array of key-values apart element by element, through a mapped file: ten seconds for the tokens, scores and
kinds of a vocabulary of 262,000, and transformers reads a file for its configuration, its tokenizer and its weights. It
also has the map of names of all tensors made for every module of a model.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType

from lightning_gsq.models.replaced import replaced

LENGTH = struct.Struct("<Q")


class QuickReader(GGUFReader):
    """Reads what its base class reads, an array at once."""

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[np.ndarray], list[int], list[GGUFValueType]]:
        """Size, parts, which of them are values, and types of a value; see the base class."""
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        head: list[np.ndarray] = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        begin, count, element = orig_offs + 12, int(head[1][0]), GGUFValueType(head[0][0])
        if element in self.gguf_scalar_to_np:
            values = np.asarray(self._get(begin, self.gguf_scalar_to_np[element], count))
            size, parts, step = values.nbytes, list(values[:, None]), 1
        elif element == GGUFValueType.STRING:
            size, parts = self._strings(begin, count)
            step = 2
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, element] if count else [GGUFValueType.ARRAY]
        return 12 + size, head + parts, list(range(1 + step, len(head) + len(parts), step)), types

    def _strings(self, begin: int, count: int) -> tuple[int, list[np.ndarray]]:
        """Bytes that so many strings take, and for each its length and its characters."""
        content = np.asarray(self.data)  # slices of a mapped array cost microseconds each
        octets = content.data
        parts, place = list[np.ndarray](), begin
        for _ in range(count):
            (length,) = LENGTH.unpack_from(octets, place)
            parts += [content[place : place + 8].view(np.uint64), content[place + 8 : place + 8 + length]]
            place += 8 + length
        return place - begin, parts


@contextmanager
def quick_reader() -> Iterator[None]:
    """Has transformers read GGUF files by :class:`QuickReader` inside, and make each map of names once."""
    names: Any = functools.cache(gguf.get_tensor_name_map)
    with replaced(gguf, "GGUFReader", QuickReader), replaced(gguf, "get_tensor_name_map", names):
        yield
