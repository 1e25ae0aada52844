"""How the scales of a matrix are stored: a scheme is a grid with a scale layout.

In every layout a weight is, in fp32 and in this order of operations,

    w = s[g] * value(code) + o[g]

with a scale ``s`` and, in some layouts, an offset ``o`` for each group ``g`` of consecutive weights of a row. Layouts
differ in what is stored for them:

| layout                | stored                                         | s[g]                | o[g]                  |
|-----------------------|------------------------------------------------|---------------------|-----------------------|
| flat                  | ``scales`` O G                                 | scales              |                       |
| flat with offset      | ``scales``, ``offsets`` O G                    | scales              | offsets               |
| two-level             | ``scales`` O B, integers ``sub_scales`` O G    | scales * sub_scales |                       |
| two-level with offset | these, ``offsets`` O B, ``sub_offsets`` O G    | scales * sub_scales | offsets * sub_offsets |

| two-level, odd        | ``scales`` O B, integers ``sub_scales`` O G    | see below           |                       |

where ``B`` counts blocks of 256 weights. This is ggml's own arithmetic (its ``dmin`` is ``offsets`` with the other
sign, which changes no bit), and MLX's (``biases`` are ``offsets``), so that a weight stored there is the run's.

In the odd layout ``s[g] = scales * (2 sub_scales + 1) * unit``, a power of two: what ggml's I-types have.

The pieces: :class:`Integers` says which small integers there are; :class:`ScaleLayout` which tensors, of which shapes,
at how many bits, and what they amount to. :class:`~lightning_gsq.weights.quantized.QuantizedTensor` holds the codes and
these tensors in their stored form, and everything that it says (dense weight, packed tensors, bits) follows from the
two. :mod:`lightning_gsq.weights.presets` are the schemes that have names. A layout that fixes the dtype of its floats
trains them *as stored*: a float master, rounded in every forward pass, so that rounding at the end changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCALES, OFFSETS, SUB_SCALES, SUB_OFFSETS = "scales", "offsets", "sub_scales", "sub_offsets"
FLOATS = (SCALES, OFFSETS)
"""Names of the parts that are floats; the others are small integers."""


@dataclass(frozen=True)
class Integers:
    """The integers ``low ... high``, a power of two of them."""

    low: int
    high: int

    @property
    def bits(self) -> int:
        """Bits that one takes."""
        return (self.high - self.low).bit_length()

    def nearest(self, value: Tensor) -> Tensor:
        """The closest of them, same dtype."""
        return value.round().clamp(self.low, self.high)


@dataclass(frozen=True)
class Part:
    """One of the tensors that scales are stored as.

    Args:
        columns: Numbers in a row.
        integers: Which integers they are; None for floats.
    """

    columns: int
    integers: Integers | None = None


@dataclass(frozen=True)
class ScaleLayout:
    """What is stored for the scales of a matrix.

    Args:
        offset: Whether a group has an offset beside its scale.
        block: Weights of a row that share a float, over a small integer of each group; 0 where groups have floats.
        sub_scales: Those integers.
        sub_offsets: The integers of the offsets.
        dtype: Stored dtype of the floats; None for the run's own (scale_dtype).
        odd_unit: The unit of the odd layout; 0 where a scale is multiplied by the integer itself.
    """

    offset: bool = False
    block: int = 0
    sub_scales: Integers | None = None
    sub_offsets: Integers | None = None
    dtype: torch.dtype | None = None
    odd_unit: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether a scale is a float a group, and nothing else."""
        return not self.offset and self.sub_scales is None

    def parts(self, columns: int, group_length: int) -> dict[str, Part]:
        """The tensors of a matrix with rows of ``columns`` weights, by name."""
        groups = -(-columns // group_length)
        floats = -(-columns // self.block) if self.block else groups
        parts = {SCALES: Part(floats)}
        if self.sub_scales is not None:
            parts[SUB_SCALES] = Part(groups, self.sub_scales)
        if self.offset:
            parts[OFFSETS] = Part(floats)
        if self.sub_offsets is not None:
            parts[SUB_OFFSETS] = Part(groups, self.sub_offsets)
        return parts

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """``s``, fp32 ``O G``; differentiable."""
        return _product(parts[SCALES], self.factors(parts))

    def factors(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """What each group multiplies the float of its block by, ``O G``; None where groups have floats of their own."""
        integers = parts.get(SUB_SCALES)
        if self.odd_unit and integers is not None:
            return (2 * integers.float() + 1) * self.odd_unit
        return integers

    def integers(self, factors: Tensor) -> Tensor:
        """The real-valued ``sub_scales`` that would make these :meth:`factors`."""
        return (factors / self.odd_unit - 1) / 2 if self.odd_unit else factors

    def offsets(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """``o``, fp32 ``O G``; differentiable; None in a layout without."""
        return _product(parts[OFFSETS], parts.get(SUB_OFFSETS)) if self.offset else None

    def stored(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The part of that name as it is stored: rounded to ``dtype`` or, where the layout fixes one, to that.

        Integers are int16.
        """
        integers = {SUB_SCALES: self.sub_scales, SUB_OFFSETS: self.sub_offsets}.get(name)
        return value.to(self.dtype or dtype) if integers is None else integers.nearest(value).to(torch.int16)


FLAT = ScaleLayout()


def _product(float_OB: Tensor, integer_OG: Tensor | None) -> Tensor:
    if integer_OG is None:
        return float_OB.float()
    groups = integer_OG.shape[1] // float_OB.shape[1]
    return float_OB.float().repeat_interleave(groups, dim=1) * integer_OG.float()
