"""Types whose weights are code vectors with signs: IQ1, IQ2 and IQ3.

Four or eight consecutive weights are one of some hundred vectors; each weight has a sign, and a group of weights has a
small whole number ``s``. With the fp16 scale ``d`` of the block of 256, a weight is, in fp32,

    IQ2, IQ3    d * (2 s + 1) * unit * vector * sign
    IQ1         d * (2 s + 1) * (vector + 1/8), or (vector - 1/8), one choice for all weights of a shift group

How many vectors each type has, of how many weights, and the like: :mod:`lightning_gsq.weights.code_vectors`.

All products are exact in fp32, so that their order does not matter. Every pattern of bits is one structure and the
other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.gguf.types.table import GgmlType
from lightning_gsq.weights.code_vectors import VECTORS, CodeVectors, codebook

SHIFT = 0.125


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
    def grid(self) -> CodeVectors:
        """What the type can say of some weights."""
        return VECTORS[self.kind.name]

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
        unit: As in :class:`~lightning_gsq.weights.code_vectors.CodeVectors`.
    """
    per_block = s_OG.shape[-1] // d_OB.shape[-1] if d_OB.shape[-1] else 1
    return d_OB.float().repeat_interleave(per_block, -1) * ((2 * s_OG.float() + 1) * unit)
