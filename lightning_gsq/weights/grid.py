"""The grid of one weight: which codes there are, what each is worth, and how many bits it is stored in.

Everything that differs between widths is said here once: levels, candidates of the Gumbel choice, stored form, how a
position is rounded. A *code* is the integer that a weight has; its *value* is what the group's scale multiplies. They
are the same number unless the grid has a table of values; a *position* is a weight over its scale, not rounded yet.

| grid             | codes                       | values    | stored as                |
|------------------|-----------------------------|-----------|--------------------------|
| 1                | -1, +1                      | the codes | 1 bit                    |
| "ternary"        | -1, 0, +1                   | the codes | 2 bits, the first unused |
| b = 2 ... 8      | -2^(b-1) ... 2^(b-1) - 1    | the codes | b bits                   |
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError

Bits = int | Literal["ternary"]
MIN_BITS, MAX_BITS = 1, 8
MAX_WHOLE = 4
"""Grids with at most so many levels are trained whole, larger ones by local shifts around a code."""


@dataclass(frozen=True)
class Candidates:
    """What a trained weight chooses from.

    Args:
        levels: Codes of the grid, or shifts around the code that training starts from.
        local: Whether they are shifts.
    """

    levels: tuple[int, ...]
    local: bool

    @property
    def logits(self) -> int:
        """Logits a weight: one stands for a pair."""
        return 1 if len(self.levels) == 2 else len(self.levels)


@dataclass(frozen=True)
class Grid:
    """A grid of codes.

    Args:
        low: The smallest code.
        high: The largest code.
        storage_bits: Bits that one packed code takes.
        step: From one code to the next.
        origin: The code that is stored as 0, where it exists.
        confidence: What the initial logits' confidence in a warm start is, unless told otherwise (alpha).
    """

    low: int
    high: int
    storage_bits: int
    step: int = 1
    origin: int = 0
    confidence: float = 6.0

    @property
    def levels(self) -> tuple[int, ...]:
        """All codes in rising order."""
        return tuple(range(self.low, self.high + 1, self.step))

    @property
    def binary(self) -> bool:
        """Whether there are two codes, which one logit tells apart."""
        return len(self.levels) == 2

    @property
    def gaps(self) -> bool:
        """Whether some stored number stands for no code."""
        return len(self.levels) < 2**self.storage_bits

    @property
    def mirrored(self) -> bool:
        """Whether the grid with a negative scale is another one."""
        return self.low != -self.high

    def candidates(self, shifts: int) -> Candidates:
        """What a trained weight chooses from: the whole grid, or up to ``shifts`` codes to each side."""
        if len(self.levels) <= MAX_WHOLE:
            return Candidates(self.levels, local=False)
        return Candidates(tuple(range(-shifts, shifts + 1)), local=True)

    def nearest(self, position: Tensor) -> Tensor:
        """The code closest to each position, same dtype; ties round to even, binary zero to +1."""
        if self.binary:
            return torch.where(position < 0, float(self.low), float(self.high)).to(position.dtype)
        return position.round().clamp(self.low, self.high)

    def store(self, codes: Tensor) -> Tensor:
        """The unsigned integers that are packed, int16."""
        return (codes.to(torch.int16) - self.origin) // self.step

    def restore(self, unsigned: Tensor) -> Tensor:
        """Inverse of :meth:`store`, int8.

        Raises:
            ValueError: a number stands for no code.
        """
        codes = self.step * unsigned.to(torch.int16) + self.origin
        if codes.numel() and int(codes.min()) < self.low:
            raise ValueError(f"a code lies below the lowest level {self.low} of the grid {self.low} ... {self.high}")
        return codes.to(torch.int8)


def grid_of(bits: Bits) -> Grid:
    """The symmetric grid of this width.

    Raises:
        ConfigurationError: there is none.
    """
    if bits != "ternary" and not (isinstance(bits, int) and MIN_BITS <= bits <= MAX_BITS):
        raise ConfigurationError(f"bits must be {MIN_BITS} to {MAX_BITS} or 'ternary', got {bits!r}")
    return _symmetric(bits)


@functools.cache
def _symmetric(bits: Bits) -> Grid:
    if bits == "ternary":
        return Grid(-1, 1, storage_bits=2, origin=-2, confidence=3.0)
    if bits == 1:
        return Grid(-1, 1, storage_bits=1, step=2, origin=-1)
    low = -(2 ** (int(bits) - 1))
    return Grid(low, -low - 1, storage_bits=int(bits), origin=low)
