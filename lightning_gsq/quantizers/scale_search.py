"""The scale of a group, searched over shrink factors of its range and over *both signs*.

The grid -2 ... 1 is asymmetric, so that a negative scale is often the better one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.weights.scheme import QuantScheme

SHRINK_STEPS = 40
SMALLEST_SHRINK = 0.2
TINY = 1e-8
"""Floor of a scale's magnitude, so that a group of zeros divides by something."""


def search_scale(
    w_OC: Tensor, scheme: QuantScheme, importance_C: Tensor | None = None, exponent: float = 2.4
) -> Tensor:
    """The scale of one group a row: the smallest weighted error among shrunk ranges, both signs tried.

    Args:
        w_OC: fp32, the group's weights.
        scheme: The grid.
        importance_C: Weights of the squared errors, one a column; None for ``|error|^exponent`` unweighted.
        exponent: Used without ``importance_C``.

    Returns:
        fp32 scales ``O``, negative where a mirrored grid fits better; never zero.
    """
    top_O, bottom_O = w_OC.amax(1), w_OC.amin(1)
    grid = scheme.grid
    bases = [torch.maximum(top_O / grid.high, bottom_O / grid.low)]
    if grid.mirrored:
        bases.append(-torch.maximum(top_O / -grid.low, bottom_O / -grid.high))
    best_error_O = torch.full_like(top_O, torch.inf)
    best_O = torch.ones_like(top_O)
    shrinks = torch.linspace(1, SMALLEST_SHRINK, SHRINK_STEPS, dtype=w_OC.dtype)
    for base_O in bases:
        base_O = torch.where(base_O.abs() < TINY, TINY, base_O)
        for shrink in shrinks.tolist():
            s_O = base_O * shrink
            error_OC = w_OC - s_O[:, None] * grid.nearest(w_OC / s_O[:, None])
            if importance_C is None:
                error_O = error_OC.abs_().pow_(exponent).sum(1)
            else:
                error_O = error_OC.square_() @ importance_C
            better_O = error_O < best_error_O
            best_error_O = torch.where(better_O, error_O, best_error_O)
            best_O = torch.where(better_O, s_O, best_O)
    return best_O
