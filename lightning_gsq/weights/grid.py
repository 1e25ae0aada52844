"""The grid of one weight: which codes there are, what each is worth, and how many bits it is stored in.

Everything that differs between widths is said here once: levels, candidates of the Gumbel choice, stored form, how a
position is rounded. A *code* is the integer that a weight has; its *value* is what the group's scale multiplies. They
are the same number unless the grid has a table of values; a *position* is a weight over its scale, not rounded yet.

| grid             | codes                       | values    | stored as                |
|------------------|-----------------------------|-----------|--------------------------|
| 1                | -1, +1                      | the codes | 1 bit                    |
| "ternary"        | -1, 0, +1                   | the codes | 2 bits, the first unused |
| b = 2 ... 8      | -2^(b-1) ... 2^(b-1) - 1    | the codes | b bits                   |
| unsigned, b bits | 0 ... 2^b - 1               | the codes | b bits                   |
| a table          | 0 ... 2^b - 1               | its entry | b bits                   |
| code vectors     | see ``vector_grid``         | the codes | one number for some      |

Unsigned grids go with an offset (:mod:`lightning_gsq.weights.layout`). A table's entries rise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.packing import pack, packed_words, unpack

Bits = int | Literal["ternary"]
Unpack = Callable[[Tensor, int, int], Tensor]
"""Unsigned numbers ``O n`` of words, bits a number and ``n``."""
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
        """Logits a weight: one stands for -1 and +1."""
        return 1 if self.levels == (-1, 1) else len(self.levels)


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
        table: The value of each code; None where a code is its own value.
    """

    low: int
    high: int
    storage_bits: int
    step: int = 1
    origin: int = 0
    confidence: float = 6.0
    table: tuple[int, ...] | None = None

    @property
    def levels(self) -> tuple[int, ...]:
        """All codes in rising order."""
        return tuple(range(self.low, self.high + 1, self.step))

    @property
    def values(self) -> tuple[int, ...]:
        """The value of every code in rising order."""
        return self.levels if self.table is None else self.table

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest signed integers that hold every code."""
        return torch.int8 if self.high < 128 else torch.int16

    @property
    def binary(self) -> bool:
        """Whether the codes are -1 and +1: a sign, which one logit decides."""
        return self.levels == (-1, 1)

    @property
    def gaps(self) -> bool:
        """Whether some stored number stands for no code."""
        return len(self.levels) < 2**self.storage_bits

    @property
    def mirrored(self) -> bool:
        """Whether the grid with a negative scale is another one."""
        return self.values[0] != -self.values[-1]

    def candidates(self, shifts: int) -> Candidates:
        """What a trained weight chooses from: the whole grid, or up to ``shifts`` codes to each side."""
        if len(self.levels) <= MAX_WHOLE:
            return Candidates(self.levels, local=False)
        return Candidates(tuple(range(-shifts, shifts + 1)), local=True)

    def nearest(self, position: Tensor) -> Tensor:
        """The code whose value is closest to each position, same dtype; ties round to even, binary zero to +1."""
        if self.table is not None:
            return torch.bucketize(position, _borders(self.table, position.device)).to(position.dtype) + self.low
        return self.code_at(position)

    def nearest_value_(self, position: Tensor) -> Tensor:
        """``value_of(nearest(position))``; evenly spaced values are written into ``position`` itself."""
        if self.table is not None or self.binary:
            return self.value_of(self.nearest(position))
        return position.round_().clamp_(self.low, self.high)

    def code_at(self, coordinate: Tensor) -> Tensor:
        """The code closest to each position measured in codes, same dtype; ties as in :meth:`nearest`."""
        if self.binary:
            return torch.where(coordinate < 0, float(self.low), float(self.high)).to(coordinate.dtype)
        return coordinate.round().clamp(self.low, self.high)

    def value_of(self, codes: Tensor) -> Tensor:
        """What each code is worth: the codes as they are, or the table's entries as fp32."""
        if self.table is None:
            return codes
        return _entries(self.table, codes.device)[(codes - self.low).long()]

    def coordinate(self, position: Tensor) -> Tensor:
        """Positions measured in codes, between whose values they lie; beyond the ends of a table, its ends."""
        if self.table is None:
            return position
        entries = _entries(self.table, position.device).to(position.dtype)
        below = torch.bucketize(position, entries, right=True).sub(1).clamp(0, len(entries) - 2)
        share = (position - entries[below]) / (entries[below + 1] - entries[below])
        return below + share.clamp(-0.5, 1.5) + self.low

    def store(self, codes: Tensor) -> Tensor:
        """The unsigned integers that are packed, int16."""
        return (codes.to(torch.int16) - self.origin) // self.step

    def codes_of(self, unsigned: Tensor) -> Tensor:
        """The codes of stored numbers, in :attr:`code_dtype`, unchecked."""
        return (self.step * unsigned.to(torch.int16) + self.origin).to(self.code_dtype)

    def restore(self, unsigned: Tensor) -> Tensor:
        """Inverse of :meth:`store`, in :attr:`code_dtype`.

        Raises:
            ValueError: a number stands for no code.
        """
        return self.verified(self.codes_of(unsigned))

    def fields(self, columns: int) -> dict[str, tuple[int, int]]:
        """The tensors of words that a row's codes are packed as: by name, how many numbers, and bits of each."""
        return {"codes": (columns, self.storage_bits)}

    def words(self, columns: int) -> dict[str, int]:
        """Their int32 words in a row."""
        return {name: packed_words(*field) for name, field in self.fields(columns).items()}

    def row_bits(self, columns: int) -> int:
        """Bits of a row's codes, what fills words up not counted."""
        return sum(count * bits for count, bits in self.fields(columns).values())

    def pack(self, codes_OI: Tensor) -> dict[str, Tensor]:
        """Codes as words, by name.

        Raises:
            ValueError: a code is none of the grid's.
        """
        return {"codes": pack(self.store(codes_OI), self.storage_bits)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, unpacker: Unpack = unpack) -> Tensor:
        """Inverse of :meth:`pack`, in :attr:`code_dtype`, unchecked.

        Args:
            tensors: The words, by name.
            columns: Weights of a row.
            unpacker: Unpacks one of them; the default does it on the CPU.
        """
        return self.codes_of(unpacker(tensors["codes"], self.storage_bits, columns))

    def logits_per_weight(self, shifts: int, vectors: int) -> float:
        """Logits that train for one weight, with so many shifts to each side, or so many candidates of a vector."""
        return self.candidates(shifts).logits

    def verified(self, codes: Tensor) -> Tensor:
        """The codes, none of which lies below the grid.

        Raises:
            ValueError: one does.
        """
        if codes.numel() and int(codes.min()) < self.low:
            raise ValueError(f"a code lies below the lowest level {self.low} of the grid {self.low} ... {self.high}")
        return codes


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


def unsigned_grid(bits: int) -> Grid:
    """The codes 0 ... 2^bits - 1, for layouts with an offset."""
    return Grid(0, 2**bits - 1, storage_bits=bits)


def table_grid(values: tuple[int, ...]) -> Grid:
    """Codes that stand for these values, which rise; their number is a power of two."""
    return Grid(0, len(values) - 1, storage_bits=(len(values) - 1).bit_length(), table=values)


@functools.cache
def _entries(table: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=device)


@functools.cache
def _borders(table: tuple[int, ...], device: torch.device) -> Tensor:
    """Halfway between neighbours."""
    entries = _entries(table, device)
    return (entries[1:] + entries[:-1]) / 2
