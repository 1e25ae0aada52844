"""Types whose weight is a scale times a level, less an offset.

A weight of a block with the scale ``d`` is, in fp32 and in this order of operations,

    (d * sc) * level[code] - dmin * m

where ``sc`` and ``m`` are small integers that some consecutive weights share. Where a type has no such integers, they
are one; where it has no offset, the subtraction is not there. The offset of Q4_1 and Q5_1 is added in ggml: here it is
``dmin`` with the other sign, which changes no bit of the result.

| type         | level                  | weights of sc | sc         | m       |
|--------------|------------------------|---------------|------------|---------|
| Q1_0         | -1, 1                  |               |            |         |
| Q2_0, TQ2_0  | -1 ... 2               |               |            |         |
| TQ1_0        | -1 ... 1               |               |            |         |
| Q4_0, Q5_0   | -8 ... 7, -16 ... 15   |               |            |         |
| Q8_0         | -128 ... 127           |               |            |         |
| Q4_1, Q5_1   | 0 ... 15, 0 ... 31     |               |            | one     |
| IQ4_NL       | 16 uneven ones         |               |            |         |
| IQ4_XS       | the same               | 32            | -32 ... 31 |         |
| Q2_K         | 0 ... 3                | 16            | 0 ... 15   | 0 ... 15|
| Q3_K         | -4 ... 3               | 16            | -32 ... 31 |         |
| Q4_K, Q5_K   | 0 ... 15, 0 ... 31     | 32            | 0 ... 63   | 0 ... 63|
| Q6_K         | -32 ... 31             | 16            | -128 ... 127|        |

Every pattern of bits is one structure and the other way round, but for TQ1_0: of the 256 values of a byte, 243 (in the
last four bytes of codes, 81) are ever written, and the others mean the same codes as one of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from lightning_gsq.gguf.types.table import GgmlType


@dataclass(frozen=True)
class Plane:
    """Some bits of every code, in runs of bytes (:mod:`lightning_gsq.gguf.types.bits`)."""

    bits: int
    run: int


@dataclass(frozen=True)
class LevelGrid:
    """What a type can say of a weight.

    Args:
        levels: The level of every code.
        planes: The codes' bits in the block, the lowest first; none for a byte a code, and for base-3 digits.
        parts: The block's parts in their order: ``d``, ``min`` (dmin), ``scales``, ``codes`` or one of the planes by
            number.
        group: Weights that share ``sc`` and ``m``; 0 where there are none.
        sc: Smallest and largest ``sc``.
        m: Smallest and largest ``m``.
    """

    levels: tuple[int, ...]
    planes: tuple[Plane, ...]
    parts: str
    group: int = 0
    sc: tuple[int, int] | None = None
    m: tuple[int, int] | None = None


def _evenly(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


_UNEVEN = tuple(int(value) for value in gguf.quants.IQ4_NL.kvalues)
_NIBBLES, _FIFTH = Plane(4, 16), Plane(1, 1)
GRIDS = {
    "Q1_0": LevelGrid((-1, 1), (Plane(1, 1),), "d 0"),
    "Q2_0": LevelGrid(_evenly(-1, 2), (Plane(2, 1),), "d 0"),
    "Q4_0": LevelGrid(_evenly(-8, 7), (_NIBBLES,), "d 0"),
    "Q4_1": LevelGrid(_evenly(0, 15), (_NIBBLES,), "d min 0"),
    "Q5_0": LevelGrid(_evenly(-16, 15), (_NIBBLES, _FIFTH), "d 1 0"),
    "Q5_1": LevelGrid(_evenly(0, 31), (_NIBBLES, _FIFTH), "d min 1 0"),
    "Q8_0": LevelGrid(_evenly(-128, 127), (), "d codes"),
    "Q2_K": LevelGrid(_evenly(0, 3), (Plane(2, 32),), "scales 0 d min", 16, (0, 15), (0, 15)),
    "Q3_K": LevelGrid(_evenly(-4, 3), (Plane(2, 32), Plane(1, 32)), "1 0 scales d", 16, (-32, 31)),
    "Q4_K": LevelGrid(_evenly(0, 15), (Plane(4, 32),), "d min scales 0", 32, (0, 63), (0, 63)),
    "Q5_K": LevelGrid(_evenly(0, 31), (Plane(4, 32), Plane(1, 32)), "d min scales 1 0", 32, (0, 63), (0, 63)),
    "Q6_K": LevelGrid(_evenly(-32, 31), (Plane(4, 64), Plane(2, 32)), "0 1 scales d", 16, (-128, 127)),
    "IQ4_NL": LevelGrid(_UNEVEN, (_NIBBLES,), "d 0"),
    "IQ4_XS": LevelGrid(_UNEVEN, (_NIBBLES,), "d scales 0", 32, (-32, 31)),
    "TQ1_0": LevelGrid((-1, 0, 1), (), "codes d"),
    "TQ2_0": LevelGrid(_evenly(-1, 2), (Plane(2, 32),), "0 d"),
}
"""By the type's name."""


@dataclass(frozen=True)
class LevelBlocks:
    """The blocks of a matrix in a type of levels.

    Args:
        kind: The type.
        codes_OI: uint8, which of the type's levels, ``O I``.
        d_OB: fp16, the scale of every block, ``O B``.
        sc_OG: int8, the integers that scale groups, ``O G``; None where the type has none.
        dmin_OB: fp16, the scale of offsets, ``O B``; None where the type has no offset.
        m_OG: int8, the integers that scale offsets, ``O G``; None where the type has none.
    """

    kind: GgmlType
    codes_OI: Tensor
    d_OB: Tensor
    sc_OG: Tensor | None = None
    dmin_OB: Tensor | None = None
    m_OG: Tensor | None = None

    @property
    def grid(self) -> LevelGrid:
        """What the type can say of a weight."""
        return GRIDS[self.kind.name]

    def values(self) -> Tensor:
        """The fp32 weights ``O I``, bit for bit as llama.cpp computes them; NaN scales give NaN weights."""
        levels = torch.tensor(self.grid.levels, dtype=torch.float32, device=self.codes_OI.device)
        return level_values(levels[self.codes_OI.long()], self.d_OB, self.sc_OG, self.dmin_OB, self.m_OG)

    def scales(self) -> list[Tensor]:
        """Its fp16 numbers."""
        return [self.d_OB] if self.dmin_OB is None else [self.d_OB, self.dmin_OB]


def level_values(
    level_OI: Tensor, d_OB: Tensor, sc_OG: Tensor | None, dmin_OB: Tensor | None, m_OG: Tensor | None
) -> Tensor:
    """``(d * sc) * level - dmin * m`` in fp32, differentiable in each of them.

    Args:
        level_OI: fp32 levels.
        d_OB: A scale a block, any float type.
        sc_OG: An integer (or a float that stands for it) a group, or None.
        dmin_OB: A scale of offsets a block, or None.
        m_OG: An integer (or a float that stands for it) a group, or None.

    Returns:
        fp32, ``O I``.
    """
    columns = level_OI.shape[-1]
    value_OI = _spread(_scaled(d_OB, sc_OG), columns) * level_OI
    return value_OI if dmin_OB is None else value_OI - _spread(_scaled(dmin_OB, m_OG), columns)


def _scaled(d_OB: Tensor, factor_OG: Tensor | None) -> Tensor:
    return d_OB.float() if factor_OG is None else _spread(d_OB.float(), factor_OG.shape[-1]) * factor_OG.float()


def _spread(value_OG: Tensor, columns: int) -> Tensor:
    return value_OG.repeat_interleave(columns // value_OG.shape[-1], dim=-1)
