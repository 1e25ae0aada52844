"""Dense packing of small unsigned integers into int32 words.

One layout serves every format: element ``i`` of a row starts at bit ``i * bits`` of the row's little-endian bit
stream, and rows are padded to whole words. Elements may straddle two words (3, 5, 6 and 7 bits). It is the layout
of compressed-tensors from 0.17 on, and, along the other axis, of GPTQ's ``qweight``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

WORD_BITS, OCTET = 32, 8


def packed_words(in_features: int, bits: int) -> int:
    """int32 words that a row of ``in_features`` values takes."""
    return -(-in_features * bits // WORD_BITS)


def pack(values_OI: Tensor, bits: int) -> Tensor:
    """Packs unsigned values into words.

    Args:
        values_OI: Integers in ``[0, 2**bits)``, any integer dtype, on any device.
        bits: Bits a value, 1 to 16.

    Returns:
        int32 words, ``O ceil(I * bits / 32)``, on the CPU.

    Raises:
        ValueError: a value does not fit.
    """
    if values_OI.numel() and (int(values_OI.min()) < 0 or int(values_OI.max()) >= 2**bits):
        raise ValueError(
            f"values must lie in 0 ... {2**bits - 1} to be packed in {bits} bits, "
            f"got {int(values_OI.min())} ... {int(values_OI.max())}"
        )
    rows, columns = values_OI.shape
    values = values_OI.to("cpu", torch.int32 if bits > OCTET else torch.uint8).numpy()
    octets = values.astype("<u2")[..., None].view(np.uint8) if bits > OCTET else values[..., None]
    stream = np.zeros((rows, packed_words(columns, bits) * WORD_BITS), dtype=np.uint8)
    stream[:, : columns * bits] = np.unpackbits(octets, axis=-1, bitorder="little", count=bits).reshape(rows, -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32, copy=False))


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        words: int32, ``O ceil(I * bits / 32)``.
        bits: Bits a value, 1 to 16.
        in_features: ``I``.

    Returns:
        uint8 values, ``O I``, on the CPU; int32 above 8 bits.

    Raises:
        ValueError: the words do not have that shape or dtype.
    """
    expected = packed_words(in_features, bits)
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != expected:
        raise ValueError(
            f"expected int32 words of shape (O, {expected}) for {in_features} values of {bits} bits, "
            f"got {words.dtype} {tuple(words.shape)}"
        )
    octets = np.ascontiguousarray(words.cpu().numpy().astype("<i4", copy=False)).view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")[:, : in_features * bits]
    values = np.packbits(stream.reshape(len(octets), in_features, bits), axis=-1, bitorder="little")
    if bits <= OCTET:
        return torch.from_numpy(values[..., 0])
    return torch.from_numpy(values.view("<u2")[..., 0].astype(np.int32))


def index_bits(count: int) -> int:
    """Bits of a number below ``count``."""
    return math.ceil(math.log2(count)) if count > 1 else 0


def pack_flat(values: Tensor, bits: int) -> Tensor:
    """One stream for all values, whatever their shape: no row ends in padding; nothing where a value takes no bits."""
    return pack(values.reshape(1, -1), bits) if bits else torch.zeros(1, 0, dtype=torch.int32)


def unpack_flat(words: Tensor, bits: int, count: int) -> Tensor:
    """``count`` values of one stream, uint8; zeros where a value takes no bits."""
    return unpack(words, bits, count)[0] if bits else torch.zeros(count, dtype=torch.uint8)


def expect_parts(tensors: dict[str, Tensor], names: set[str]) -> None:
    """Checks what a weight is stored as.

    Raises:
        ValueError: other tensors than the named ones.
    """
    if set(tensors) != names:
        raise ValueError(f"it is stored as {sorted(tensors)}, expected {sorted(names)}")
