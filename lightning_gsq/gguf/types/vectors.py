"""Types whose weights are code vectors with signs: IQ1, IQ2 and IQ3.

Four or eight consecutive weights are one of some hundred vectors; each weight has a sign, and a group of weights has a
small whole number ``s``. With the fp16 scale ``d`` of the block of 256, a weight is, in fp32,

    IQ2, IQ3    d * (2 s + 1) * unit * vector * sign
    IQ1         d * (2 s + 1) * (vector + 1/8), or (vector - 1/8), one choice for all weights of a shift group

| type    | vectors | of | weights of s | s       | unit | signs                          | bits |
|---------|---------|----|--------------|---------|------|--------------------------------|------|
| IQ2_XXS | 256     | 8  | 32           | 0 ... 15| 1/8  | an even number of - among 8    | 2.06 |
| IQ2_XS  | 512     | 8  | 16           | 0 ... 15| 1/8  | an even number of - among 8    | 2.31 |
| IQ2_S   | 1,024   | 8  | 16           | 0 ... 15| 1/8  | free                           | 2.56 |
| IQ3_XXS | 256     | 4  | 32           | 0 ... 15| 1/4  | an even number of - among 8    | 3.06 |
| IQ3_S   | 512     | 4  | 32           | 0 ... 15| 1    | free                           | 3.44 |
| IQ1_S   | 2,048   | 8  | 32           | 0 ... 7 | 1    | none; a shift for 32           | 1.56 |
| IQ1_M   | 2,048   | 8  | 16           | 0 ... 7 | 1    | none; a shift for 8            | 1.75 |

All products are exact in fp32, so that their order does not matter. Every pattern of bits is one structure and the
other way round. The vectors are those of the ``gguf`` package.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import gguf
import torch
from torch import Tensor

from lightning_gsq.gguf.types.table import GgmlType

SHIFT = 0.125


@dataclass(frozen=True)
class VectorGrid:
    """What a type can say of some weights.

    Args:
        count: Vectors.
        length: Weights of a vector.
        group: Weights that share ``s``.
        high: Largest ``s``.
        unit: What the vectors are multiplied by.
        signs: ``even``: an even number of minus signs among eight weights; ``free``; ``none``.
        shift_group: Weights that share a shift; 0 where there is none.
    """

    count: int
    length: int
    group: int
    high: int
    unit: float
    signs: Literal["even", "free", "none"]
    shift_group: int = 0


GRIDS = {
    "IQ2_XXS": VectorGrid(256, 8, 32, 15, 0.125, "even"),
    "IQ2_XS": VectorGrid(512, 8, 16, 15, 0.125, "even"),
    "IQ2_S": VectorGrid(1024, 8, 16, 15, 0.125, "free"),
    "IQ3_XXS": VectorGrid(256, 4, 32, 15, 0.25, "even"),
    "IQ3_S": VectorGrid(512, 4, 32, 15, 1.0, "free"),
    "IQ1_S": VectorGrid(2048, 8, 32, 7, 1.0, "none", 32),
    "IQ1_M": VectorGrid(2048, 8, 16, 7, 1.0, "none", 8),
}
"""By the type's name."""


@dataclass(frozen=True)
class VectorBlocks:
    """The blocks of a matrix in a type of vectors.

    Args:
        kind: The type.
        index_OV: int16, which vector, ``O V``.
        d_OB: fp16, the scale of every block, ``O B``.
        s_OG: int8, the whole number of every group, ``O G``.
        negative_OI: bool, whether a weight is negative, ``O I``; None where the type has no signs.
        down_OS: bool, whether the weights of a shift group are shifted by -1/8 rather than by 1/8, ``O S``; None where
            the type has no shift.
    """

    kind: GgmlType
    index_OV: Tensor
    d_OB: Tensor
    s_OG: Tensor
    negative_OI: Tensor | None = None
    down_OS: Tensor | None = None

    @property
    def grid(self) -> VectorGrid:
        """What the type can say of some weights."""
        return GRIDS[self.kind.name]

    def values(self) -> Tensor:
        """The fp32 weights ``O I``, bit for bit as llama.cpp computes them; NaN scales give NaN weights."""
        shape_OI = codebook(self.kind.name).to(self.index_OV.device)[self.index_OV.long()].flatten(-2)
        columns = shape_OI.shape[-1]
        if self.down_OS is not None:
            shape_OI = shape_OI + torch.where(self.down_OS, -SHIFT, SHIFT).repeat_interleave(self.grid.shift_group, -1)
        if self.negative_OI is not None:
            shape_OI = torch.where(self.negative_OI, -shape_OI, shape_OI)
        return vector_scales(self.d_OB, self.s_OG, self.grid.unit).repeat_interleave(
            self.grid.group, -1
        ) * shape_OI.view(-1, columns)

    def scales(self) -> list[Tensor]:
        """Its fp16 numbers."""
        return [self.d_OB]


def vector_scales(d_OB: Tensor, s_OG: Tensor, unit: float) -> Tensor:
    """``d * (2 s + 1) * unit`` in fp32, ``O G``, differentiable in both.

    Args:
        d_OB: A scale a block, any float type.
        s_OG: A whole number (or a float that stands for it) a group.
        unit: As in :class:`VectorGrid`.
    """
    per_block = s_OG.shape[-1] // d_OB.shape[-1] if d_OB.shape[-1] else 1
    return d_OB.float().repeat_interleave(per_block, -1) * ((2 * s_OG.float() + 1) * unit)


@functools.cache
def codebook(name: str) -> Tensor:
    """The vectors of a type, fp32 ``count length``; not to be written to."""
    holder = getattr(gguf.quants, name)
    holder.init_grid()
    return torch.tensor(holder.grid.reshape(GRIDS[name].count, GRIDS[name].length), dtype=torch.float32)
