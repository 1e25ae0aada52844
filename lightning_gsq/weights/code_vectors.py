"""The code vectors of ggml's I-types: which there are, how many weights one is for, what their signs have to be.

| type    | vectors | of | weights of s | s        | unit | signs                      | bits |
|---------|---------|----|--------------|----------|------|----------------------------|------|
| IQ2_XXS | 256     | 8  | 32           | 0 ... 15 | 1/8  | an even number of - among 8| 2.06 |
| IQ2_XS  | 512     | 8  | 16           | 0 ... 15 | 1/8  | an even number of - among 8| 2.31 |
| IQ2_S   | 1,024   | 8  | 16           | 0 ... 15 | 1/8  | free                       | 2.56 |
| IQ3_XXS | 256     | 4  | 32           | 0 ... 15 | 1/4  | an even number of - among 8| 3.06 |
| IQ3_S   | 512     | 4  | 32           | 0 ... 15 | 1    | free                       | 3.44 |
| IQ1_S   | 2,048   | 8  | 32           | 0 ... 7  | 1    | none; a shift for 32       | 1.56 |
| IQ1_M   | 2,048   | 8  | 16           | 0 ... 7  | 1    | none; a shift for 8        | 1.75 |

The vectors are those of the ``gguf`` package; no two of a type are equal.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SIGN_GROUP = 8
"""Weights among which the number of minus signs is even, where it has to be."""


@dataclass(frozen=True)
class CodeVectors:
    """What a type can say of some weights.

    Args:
        name: The type's.
        count: Vectors, a power of two.
        length: Weights of a vector.
        group: Weights that share ``s``.
        high: Largest ``s``.
        unit: What the vectors are multiplied by.
        signs: ``even``: an even number of minus signs among eight weights; ``free``; ``none``.
        shift_group: Weights that share a shift; 0 where there is none.
    """

    name: str
    count: int
    length: int
    group: int
    high: int
    unit: float
    signs: Literal["even", "free", "none"]
    shift_group: int = 0


VECTORS = {
    entry.name: entry
    for entry in (
        CodeVectors("IQ2_XXS", 256, 8, 32, 15, 0.125, "even"),
        CodeVectors("IQ2_XS", 512, 8, 16, 15, 0.125, "even"),
        CodeVectors("IQ2_S", 1024, 8, 16, 15, 0.125, "free"),
        CodeVectors("IQ3_XXS", 256, 4, 32, 15, 0.25, "even"),
        CodeVectors("IQ3_S", 512, 4, 32, 15, 1.0, "free"),
        CodeVectors("IQ1_S", 2048, 8, 32, 7, 1.0, "none", 32),
        CodeVectors("IQ1_M", 2048, 8, 16, 7, 1.0, "none", 8),
    )
}
"""By the type's name."""


@functools.cache
def codebook(name: str) -> Tensor:
    """The vectors of a type, fp32 ``count length``; not to be written to."""
    import gguf  # takes a moment, which `import lightning_gsq` does not wait for

    holder = getattr(gguf.quants, name)
    holder.init_grid()
    entry = VECTORS[name]
    return torch.tensor(holder.grid.reshape(entry.count, entry.length), dtype=torch.float32)
