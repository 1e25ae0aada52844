"""Tensors written into the safetensors files of a model folder, none of them kept in memory.

A safetensors file begins with the places of all its tensors, the largest elements first. What comes is therefore
written to a file beside it at once, and mapped from there when the shard is full: the library writes from the mapping,
so that a shard, however large, takes no more memory than its largest tensor. The price is that every byte is written
twice, and that a shard's room is needed twice on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_gsq.system.safetensors_headers import INDEX

METADATA = {"format": "pt"}
"""Tells transformers which framework wrote a file; it refuses files without."""
SINGLE, SHARD = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors"
SHARD_SIZE = 5_000_000_000
"""Bytes after which a new weight file begins, where nobody says."""
ALIGNMENT = 64
"""Bytes that a tensor in the file beside begins at a multiple of: every dtype can be mapped from there."""


def begins_a_file(pending: int, size: int, shard_size: int) -> bool:
    """Whether the tensors of the next parameter go into a new file.

    Args:
        pending: Bytes of the file so far; a file holds one parameter at least.
        size: Bytes of the next parameter.
        shard_size: Bytes after which a new file begins.
    """
    return pending > 0 and pending + size > shard_size


class Shards:
    """The weight files of a model folder, filled one parameter after another.

    Args:
        folder: The folder.
        shard_size: Bytes after which a new file begins.
    """

    def __init__(self, folder: Path, shard_size: int = SHARD_SIZE) -> None:
        self.folder, self.shard_size = folder, shard_size
        self._beside: _Beside | None = None
        self._written: list[tuple[Path, list[str], int]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds tensors that belong into one file, by their names in it."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._beside is not None and begins_a_file(self._beside.size, size, self.shard_size):
            self._flush()
        self._beside = self._beside or _Beside(self.folder / f".shard-{len(self._written)}.parts")
        for name, tensor in tensors.items():
            self._beside.add(name, tensor)

    def finish(self) -> dict[str, int]:
        """Writes what is left and, of several files, the index; returns the bytes of each file's header by its name."""
        self._flush()
        headers: dict[str, int] = {}
        index: dict[str, str] = {}
        for number, (path, names, size) in enumerate(self._written, start=1):
            final = SINGLE if len(self._written) == 1 else SHARD.format(number, len(self._written))
            path = path.replace(self.folder / final)
            headers[final] = path.stat().st_size - size
            index |= dict.fromkeys(names, final)
        if len(self._written) > 1:
            content = {"metadata": {"total_size": sum(size for *_, size in self._written)}, "weight_map": index}
            (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return headers

    def _flush(self) -> None:
        if self._beside is None:
            return
        path = self.folder / f".shard-{len(self._written)}.safetensors"
        names, size = self._beside.write(path)
        self._written.append((path, names, size))
        self._beside = None


class _Beside:
    """Tensors of the coming shard, one after another in a file that is gone when the shard is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._file: BinaryIO = path.open("wb")
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor."""
        begin = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(begin)
        self._places[name] = begin, tensor.dtype, tensor.shape
        self.size += tensor.nbytes
        if tensor.numel():
            content: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            self._file.write(content)  # a buffer, which its type does not say

    def write(self, path: Path) -> tuple[list[str], int]:
        """Writes the shard; returns the names in it, and the bytes of their numbers."""
        self._file.close()
        length = self.path.stat().st_size
        bytes_n = torch.from_file(str(self.path), shared=False, size=length, dtype=torch.uint8) if length else None
        save_file({name: _mapped(bytes_n, *place) for name, place in self._places.items()}, path, METADATA)
        path.chmod(0o666 & ~_umask())  # safetensors leaves it to the owner alone
        del bytes_n  # some systems keep a file for as long as it is mapped
        self.path.unlink()
        return list(self._places), self.size


def _mapped(bytes_n: Tensor | None, begin: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if bytes_n is None or not shape.numel():
        return torch.empty(shape, dtype=dtype)
    return bytes_n[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
