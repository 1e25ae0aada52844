"""Grids whose codes come as vectors: four or eight neighbouring weights have one of some hundred patterns.

A weight of IQ2 or IQ3 is a scale times an entry of its vector times its sign; one of IQ1 a scale times an entry plus or
minus 1/8. Here a code is that factor as a small integer, sign and shift included (IQ1's in eighths), and its own value:

    IQ2    -43, -25, -8, 8, 25, 43        IQ1    8 v - 1 or 8 v + 1 with v = -1, 0, 1
    IQ3_S  -15, -13 ... 15                IQ3_XXS  -62, -52, -44 ... 62

So everything that multiplies codes by scales (dense weights, training of scales, the end-to-end phase) takes them as it
takes any grid's; only what chooses codes and what packs them knows that not every row of them exists. They are packed
as they are counted in a file of ggml's: ``codes`` are numbers of vectors, ``signs`` 7 bits for eight weights where the
eighth follows from the others, else one bit a weight, ``shifts`` one bit a shift group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gsq.weights.code_vectors import SIGN_GROUP, VECTORS, CodeVectors, codebook
from lightning_gsq.weights.grid import Grid, Unpack
from lightning_gsq.weights.packing import pack, unpack

EIGHTHS = 8
"""Codes of one step of a vector where weights are shifted by an eighth."""


@dataclass(frozen=True)
class VectorGrid(Grid):
    """A grid of code vectors.

    Args:
        vectors: Which there are.
    """

    vectors: CodeVectors = field(kw_only=True)

    @property
    def levels(self) -> tuple[int, ...]:
        """The codes that a weight of some vector can have, in rising order."""
        return _levels(self.vectors.name)

    @property
    def gaps(self) -> bool:
        """Every number of a vector, every sign and every shift is one."""
        return False

    @property
    def unit(self) -> int:
        """Weights that choose together: those of a vector, and those whose signs depend on each other."""
        return SIGN_GROUP if self.vectors.signs == "even" else self.vectors.length

    def nearest(self, position: Tensor) -> Tensor:
        """There is none for a weight alone."""
        raise TypeError(f"weights of {self.vectors.name} are not rounded one by one")

    def fields(self, columns: int) -> dict[str, tuple[int, int]]:
        """See :meth:`Grid.fields`."""
        vectors = self.vectors
        fields = {"codes": (columns // vectors.length, int(math.log2(vectors.count)))}
        if vectors.signs == "even":
            fields["signs"] = (columns // SIGN_GROUP, SIGN_GROUP - 1)
        elif vectors.signs == "free":
            fields["signs"] = (columns, 1)
        else:
            fields["shifts"] = (columns // vectors.shift_group, 1)
        return fields

    def split(self, codes_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Codes as numbers of vectors and signs or shifts.

        Args:
            codes_OI: Integers.

        Returns:
            int16 ``O V``, and bool: whether a weight is negative ``O I``, or whether the weights of a shift group are
            shifted down, ``O S``.

        Raises:
            ValueError: codes are none of the grid's.
        """
        vectors, codes_OI = self.vectors, codes_OI.to(torch.int16)
        if vectors.shift_group:
            steps_OI = (codes_OI + EIGHTHS // 2).div(EIGHTHS, rounding_mode="floor")
            shifts_OSC = (codes_OI - EIGHTHS * steps_OI).unflatten(-1, (-1, vectors.shift_group))
            if not bool(((shifts_OSC == shifts_OSC[..., :1]) & (shifts_OSC.abs() == 1)).all()):
                raise ValueError(f"the weights of a shift group of {vectors.name} have different shifts, or none")
            entries_OI, marks = steps_OI, shifts_OSC[..., 0] < 0
        else:
            entries_OI, marks = codes_OI.abs(), codes_OI < 0
        if vectors.signs == "even" and bool((marks.unflatten(-1, (-1, SIGN_GROUP)).sum(-1) % 2).any()):
            raise ValueError(f"{vectors.name} holds an even number of minus signs among eight weights, got an odd one")
        table, low, high = (part.to(codes_OI.device) for part in _numbers(vectors.name))
        if codes_OI.numel() and (int(entries_OI.min()) < low or int(entries_OI.max()) > high):
            raise ValueError(f"{vectors.name} holds entries of {int(low)} ... {int(high)}")
        digits_OI = _digits(vectors.name).to(codes_OI.device)[(entries_OI - low).long()]
        digits_OVC = digits_OI.unflatten(-1, (-1, vectors.length))
        base = len(_entries(vectors.name))
        powers_C = base ** torch.arange(vectors.length, device=codes_OI.device)
        index_OV = table[((digits_OVC.clamp_min(0)) * powers_C).sum(-1)]
        if bool((digits_OVC < 0).any()) or bool((index_OV < 0).any()):
            raise ValueError(f"some codes are none of the {vectors.count} vectors of {vectors.name}")
        return index_OV, marks

    def join(self, index_OV: Tensor, marks: Tensor) -> Tensor:
        """Inverse of :meth:`split`, int8."""
        vectors = self.vectors
        codes_OI = codes_of_vectors(vectors.name).to(index_OV.device)[index_OV.long()].flatten(-2)
        if vectors.shift_group:
            shifts_OI = torch.where(marks, -1, 1).to(torch.int8).repeat_interleave(vectors.shift_group, -1)
            return codes_OI + shifts_OI
        return torch.where(marks, -codes_OI, codes_OI)

    def pack(self, codes_OI: Tensor) -> dict[str, Tensor]:
        """See :meth:`Grid.pack`."""
        (index_OV, marks), fields = self.split(codes_OI), self.fields(codes_OI.shape[-1])
        packed = {"codes": pack(index_OV, fields["codes"][1])}
        if self.vectors.signs == "even":
            seven_OUC = marks.unflatten(-1, (-1, SIGN_GROUP))[..., :-1].to(torch.int16)
            marks = (seven_OUC << torch.arange(SIGN_GROUP - 1, device=marks.device)).sum(-1)
        name = "shifts" if self.vectors.shift_group else "signs"
        return {**packed, name: pack(marks, fields[name][1])}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, unpacker: Unpack = unpack) -> Tensor:
        """See :meth:`Grid.unpack`."""
        values = {
            name: unpacker(tensors[name], bits, count).to(torch.int16)
            for name, (count, bits) in self.fields(columns).items()
        }
        marks = values["shifts" if self.vectors.shift_group else "signs"]
        if self.vectors.signs == "even":
            seven = marks[..., None] >> torch.arange(SIGN_GROUP - 1, device=marks.device) & 1
            marks = torch.cat([seven, seven.sum(-1, keepdim=True) % 2], dim=-1).flatten(-2)
        return self.join(values["codes"], marks.bool())

    def logits_per_weight(self, shifts: int, vectors: int) -> float:
        """See :meth:`Grid.logits_per_weight`."""
        return vectors / self.unit


def vector_grid(name: str, bits: int) -> VectorGrid:
    """The grid of a type.

    Args:
        name: In capitals.
        bits: What a width is called that has none: 1, 2 or 3.
    """
    vectors = VECTORS[name]
    levels = {"IQ1": 9, "IQ2": 43}.get(name[:3], 62 if name == "IQ3_XXS" else 15)
    return VectorGrid(-levels, levels, storage_bits=bits, vectors=vectors)


@functools.cache
def codes_of_vectors(name: str) -> Tensor:
    """The vectors as codes without sign or shift, int8 ``count length``; not to be written to."""
    return (codebook(name) * (EIGHTHS if VECTORS[name].shift_group else 1)).to(torch.int8)


@functools.cache
def _entries(name: str) -> tuple[int, ...]:
    return tuple(int(entry) for entry in codebook(name).unique())


@functools.cache
def _levels(name: str) -> tuple[int, ...]:
    if VECTORS[name].shift_group:
        return tuple(sorted(EIGHTHS * entry + shift for entry in _entries(name) for shift in (-1, 1)))
    return tuple(sorted(sign * entry for entry in _entries(name) for sign in (-1, 1)))


@functools.cache
def _digits(name: str) -> Tensor:
    """Which of the entries a number is, counted from the smallest entry; -1 where it is none."""
    entries = _entries(name)
    digits = torch.full((entries[-1] - entries[0] + 1,), -1)
    digits[torch.tensor(entries) - entries[0]] = torch.arange(len(entries))
    return digits


@functools.cache
def _numbers(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The number of the vector whose digits are those of an index, -1 for none; the smallest entry and the largest."""
    entries, vectors = _entries(name), VECTORS[name]
    keys = _digits(name)[(codebook(name) - entries[0]).long()] @ (len(entries) ** torch.arange(vectors.length))
    table = torch.full((len(entries) ** vectors.length,), -1, dtype=torch.int16)
    table[keys] = torch.arange(vectors.count, dtype=torch.int16)
    return table, torch.tensor(entries[0]), torch.tensor(entries[-1])
