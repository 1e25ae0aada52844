"""Gumbel noise from a counter and a seed.

Every draw is a function of (seed, position of the weight, level), so that the backward pass draws the forward
pass's noise again without storing it, and so that results do not depend on tiling, on the number of threads or on
the backend. The counter is hashed with the 32-bit finalizer of MurmurHash3, once for each half of the seed: some
integer operations that every backend vectorizes, where Philox would need 64-bit products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


_C1, _C2 = _signed(0x85EBCA6B), _signed(0xC2B2AE35)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; int32 shifts keep the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def hash32(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on int32."""
    x = (x ^ _shift_right(x, 16)) * _C1
    x = (x ^ _shift_right(x, 13)) * _C2
    return x ^ _shift_right(x, 16)


def seed_words(seed: int, first: int = 0) -> Tensor:
    """A 63-bit seed as two int32 words; the third is the position of the first weight, for a part of a matrix."""
    words = (seed, seed >> 32, first)
    return torch.tensor([_signed(word & 0xFFFFFFFF) for word in words], dtype=torch.int32)


def uniform(counter: Tensor, seed: Tensor) -> Tensor:
    """fp32 draws strictly inside (0, 1): the centres of 2^23 cells.

    Args:
        counter: int32.
        seed: int32, whose first two words are the seed.
    """
    bits = hash32(hash32(counter ^ seed[0]) ^ seed[1])
    return (_shift_right(bits, 9).to(torch.float32) + 0.5) * 2.0**-23


def counters(rows: int, columns: int, row_stride: int, offset: int, device: torch.device) -> Tensor:
    """The position ``row * row_stride + offset + column`` of every weight, int32, wrapping around."""
    row = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
    column = torch.arange(columns, dtype=torch.int32, device=device)
    return row * row_stride + (column + offset)
