"""Bytes to structure, structure to bytes, bytes to values: for every type."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.types import levels
from lightning_gsq.gguf.types.level_bytes import decode_levels, encode_levels
from lightning_gsq.gguf.types.levels import LevelBlocks
from lightning_gsq.gguf.types.table import BY_NUMBER, TYPES, GgmlType
from lightning_gsq.gguf.types.vector_bytes import decode_vectors, encode_vectors
from lightning_gsq.gguf.types.vectors import VectorBlocks
from lightning_gsq.weights.code_vectors import VECTORS

Stored = LevelBlocks | VectorBlocks | Tensor
"""A matrix as its type stores it: blocks, or for F32, F16 and BF16 a tensor ``O I`` of that dtype."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def decode(raw: np.ndarray, kind: GgmlType) -> Stored:
    """What a matrix's bytes say.

    Args:
        raw: uint8, ``O row_bytes``.
        kind: The type.

    Raises:
        ValueError: the rows are no whole blocks, or there are none.
    """
    if raw.dtype != np.uint8 or raw.ndim != 2 or not raw.size or raw.shape[1] % kind.num_bytes:
        raise ValueError(
            f"expected rows of {kind.num_bytes}-byte {kind.name} blocks, got {raw.dtype} of shape {raw.shape}"
        )
    if kind.name in levels.GRIDS:
        return decode_levels(raw, kind)
    if kind.name in VECTORS:
        return decode_vectors(raw, kind)
    dtype = _FLOATS[kind.name]
    words = np.ascontiguousarray(raw).view(f"<i{kind.num_bytes}").astype(f"=i{kind.num_bytes}")
    return torch.from_numpy(words).view(dtype)


def encode(stored: Stored) -> np.ndarray:
    """Inverse of :func:`decode`: the same bytes (of TQ1_0, those that llama.cpp writes).

    Returns:
        uint8, ``O row_bytes``.

    Raises:
        ValueError: a number in it is none that the type holds.
    """
    if isinstance(stored, LevelBlocks):
        return encode_levels(stored)
    if isinstance(stored, VectorBlocks):
        return encode_vectors(stored)
    if stored.dtype not in _WORDS:
        raise ValueError(f"no ggml type of weights holds {stored.dtype} numbers")
    words = stored.detach().cpu().contiguous().view(_WORDS[stored.dtype]).numpy()
    return words.astype(words.dtype.newbyteorder("<")).view(np.uint8)


def values(stored: Stored) -> Tensor:
    """The fp32 weights ``O I``, bit for bit as llama.cpp computes them. Infinite and NaN scales give such weights."""
    return stored.float() if isinstance(stored, Tensor) else stored.values()


def type_of(stored: Stored) -> GgmlType:
    """The type in which a matrix is stored."""
    if isinstance(stored, Tensor):
        return next(TYPES[name] for name, dtype in _FLOATS.items() if dtype == stored.dtype)
    return stored.kind


def dequantize(raw: np.ndarray, number: int) -> Tensor:
    """The dense fp32 values ``O I`` of bytes of any type that :mod:`table` or the ``gguf`` package knows.

    Args:
        raw: uint8, ``O row_bytes``.
        number: ggml's number of the type.

    Raises:
        ConfigurationError: neither knows how to.
    """
    if number in BY_NUMBER:
        return values(decode(raw, BY_NUMBER[number]))
    try:
        dense = gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType(number))
    except (NotImplementedError, ValueError) as error:
        raise ConfigurationError(
            f"ggml's type {number} holds no weights that can be read; those that can are {', '.join(TYPES)}"
        ) from error
    return torch.from_numpy(np.array(dense, np.float32))


def scale_bits(kind: GgmlType) -> int:
    """Bits of a block that say its scales and offsets; the others are codes."""
    if kind.name in VECTORS:
        vectors = VECTORS[kind.name]
        return 16 + vectors.high.bit_length() * kind.length // vectors.group
    grid = levels.GRIDS[kind.name]
    floats = 16 * (1 + ("min" in grid.parts.split()))
    integers = sum((high - low).bit_length() for low, high in (limits for limits in (grid.sc, grid.m) if limits))
    return floats + (integers * kind.length // grid.group if grid.group else 0)


def verify_finite(stored: Stored, name: str) -> None:
    """Refuses a matrix with an infinite or NaN scale, which no training can start from.

    Args:
        stored: The matrix.
        name: Its name in the file.

    Raises:
        ConfigurationError: there is one.
    """
    what = "numbers" if isinstance(stored, Tensor) else "scales"
    for numbers in [stored] if isinstance(stored, Tensor) else stored.scales():
        count = int((~torch.isfinite(numbers)).sum())
        if count:
            raise ConfigurationError(
                f"{name} ({type_of(stored).name}) has {count} infinite or NaN {what}: the file is damaged, or was made "
                "by a quantizer that failed; get it again, or leave this tensor out with --model.exclude"
            )
