"""Fields of a few bits in bytes, in the orders in which ggml lays them.

In every order, a run of consecutive bytes holds first the lowest field of each byte, then the next field of each byte,
and so on; then comes the next run. Runs of one byte are plain little-endian order. A ggml type is made of such planes:
Q4_K's codes are one plane of 4-bit fields in runs of 32 bytes, Q5_K adds one of 1-bit fields for the fifth bit.
"""

from __future__ import annotations

import numpy as np

POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def unpack(data: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Fields of ``bits`` bits.

    Args:
        data: uint8, ``... bytes``.
        bits: 1, 2 or 4.
        run: Bytes of a run.

    Returns:
        uint8, ``... fields``.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = data.reshape(*data.shape[:-1], -1, 1, run)
    return (runs >> shifts & np.uint8((1 << bits) - 1)).reshape(*data.shape[:-1], -1)


def pack(fields: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Inverse of :func:`unpack`; of each field, the lowest ``bits`` bits count."""
    per_byte = 8 // bits
    runs = (fields & ((1 << bits) - 1)).astype(np.uint8).reshape(*fields.shape[:-1], -1, per_byte, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(runs << shifts, axis=-2).reshape(*fields.shape[:-1], -1)


def unpack_trits(data: np.ndarray, digits: int, run: int) -> np.ndarray:
    """Base-3 digits of bytes: a byte ``b`` is the fraction ``b / 256``, whose first ``digits`` digits are taken.

    Returns:
        uint8 in 0, 1, 2, ``... fields``, in runs as in :func:`unpack`.
    """
    runs = data.reshape(*data.shape[:-1], -1, 1, run)
    shifted = (runs * POWERS[:digits, None]).astype(np.uint16)  # modulo 256: the digits before fall off
    return (shifted * 3 >> 8).astype(np.uint8).reshape(*data.shape[:-1], -1)


def pack_trits(fields: np.ndarray, digits: int, run: int) -> np.ndarray:
    """Inverse of :func:`unpack_trits`: the smallest byte with these digits and zeros after them, as llama.cpp's."""
    runs = fields.reshape(*fields.shape[:-1], -1, digits, run).astype(np.uint16)
    whole = (runs * POWERS[::-1][:digits, None]).sum(axis=-2, dtype=np.uint16)
    return ((whole * 256 + 242) // 243).astype(np.uint8).reshape(*fields.shape[:-1], -1)
