"""The scale of a group, and its offset where there is one, searched over shrink factors of its range.

Scales without an offset are tried with *both signs*: the grid -2 ... 1 is asymmetric, so that a negative one is often
the better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.weights.scheme import QuantScheme

SHRINK_STEPS = 40
SMALLEST_SHRINK = 0.2
AFFINE_STEPS, SMALLEST_AFFINE = 20, 0.5
"""The same where an offset is fitted beside: least squares do the rest."""
TINY = 1e-8
"""Floor of a scale's magnitude, so that a group of zeros divides by something."""


def search_scale(
    w_OC: Tensor,
    scheme: QuantScheme,
    importance_C: Tensor | None = None,
    exponent: float = 2.4,
    steps: int = SHRINK_STEPS,
) -> Tensor:
    """The scale of one group a row: the smallest weighted error among shrunk ranges, both signs tried.

    Args:
        w_OC: fp32, the group's weights.
        scheme: The grid.
        importance_C: Weights of the squared errors, one a column (or one a weight, ``O C``); None for
            ``|error|^exponent`` unweighted.
        exponent: Used without ``importance_C``.
        steps: How many shrunk ranges are tried.

    Returns:
        fp32 scales ``O``, negative where a mirrored grid fits better; never zero.
    """
    top_O, bottom_O = w_OC.amax(1), w_OC.amin(1)
    grid = scheme.grid
    low, high = grid.values[0], grid.values[-1]
    bases = [torch.maximum(top_O / high, bottom_O / low)]
    if grid.mirrored:
        bases.append(-torch.maximum(top_O / -low, bottom_O / -high))
    best_error_O = torch.full_like(top_O, torch.inf)
    best_O = torch.ones_like(top_O)
    buffer_OC = torch.empty_like(w_OC)
    shrinks = torch.linspace(1, SMALLEST_SHRINK, steps, dtype=w_OC.dtype)
    for base_O in bases:
        base_O = torch.where(base_O.abs() < TINY, TINY, base_O)
        for shrink in shrinks.tolist():
            s_O = base_O * shrink
            # In one buffer: what these slabs cost is memory.
            value_OC = grid.nearest_value_(torch.div(w_OC, s_O[:, None], out=buffer_OC)).mul_(s_O[:, None])
            error_OC = torch.sub(w_OC, value_OC, out=value_OC)
            if importance_C is None:
                error_O = error_OC.abs_().pow_(exponent).sum(1)
            else:
                error_O = weighted_sum(error_OC.square_(), importance_C)
            better_O = error_O < best_error_O
            best_error_O = torch.where(better_O, error_O, best_error_O)
            best_O = torch.where(better_O, s_O, best_O)
    return best_O


def search_affine(
    w_RC: Tensor, scheme: QuantScheme, importance: Tensor | None = None, sinking: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and offset of one group a row, for a grid of the values 0 ... n.

    The range is shrunk towards its middle, codes are found, then the least-squares scale and offset for these codes.

    Args:
        w_RC: fp32, each row a group.
        scheme: The grid.
        importance: Weights of the squared errors, one a column or one a weight; None for one.
        sinking: The offset must not be positive.

    Returns:
        fp32 scales ``R``, positive, and offsets ``R``.
    """
    grid = scheme.grid
    h_RC = torch.ones_like(w_RC) if importance is None else importance.expand_as(w_RC)
    bottom_R, top_R = w_RC.amin(1), w_RC.amax(1)
    if sinking:
        bottom_R, top_R = bottom_R.clamp_max(0), top_R.clamp_min(0)
    span_R = (top_R - bottom_R).clamp_min(TINY)
    best_error_R = torch.full_like(span_R, torch.inf)
    best_s_R, best_o_R = span_R / grid.high, bottom_R
    mass_R, first_R = h_RC.sum(1), (h_RC * w_RC).sum(1)
    for shrink in torch.linspace(1, SMALLEST_AFFINE, AFFINE_STEPS).tolist():
        s_R, o_R = span_R * shrink / grid.high, bottom_R + span_R * (1 - shrink) / 2
        if sinking:
            o_R = bottom_R * shrink
        q_RC = grid.nearest((w_RC - o_R[:, None]) / s_R[:, None])
        codes_R, squares_R, cross_R = (h_RC * q_RC).sum(1), (h_RC * q_RC.square()).sum(1), (h_RC * q_RC * w_RC).sum(1)
        spread_R = mass_R * squares_R - codes_R.square()
        fitted_s_R = (mass_R * cross_R - codes_R * first_R) / spread_R.clamp_min(1e-30)
        fitted_o_R = (first_R - fitted_s_R * codes_R) / mass_R.clamp_min(1e-30)
        if sinking:
            high_R = fitted_o_R > 0
            fitted_s_R = torch.where(high_R, cross_R / squares_R.clamp_min(1e-30), fitted_s_R)
            fitted_o_R = fitted_o_R.clamp_max(0)
        sound_R = (spread_R > 1e-12 * mass_R.square()) & (fitted_s_R > TINY)
        for one_s_R, one_o_R in ((s_R, o_R), (fitted_s_R, fitted_o_R)):
            error_R = (h_RC * (w_RC - one_o_R[:, None] - one_s_R[:, None] * q_RC).square()).sum(1)
            better_R = (error_R < best_error_R) & (sound_R if one_s_R is fitted_s_R else True)
            best_error_R = torch.where(better_R, error_R, best_error_R)
            best_s_R = torch.where(better_R, one_s_R, best_s_R)
            best_o_R = torch.where(better_R, one_o_R, best_o_R)
    return best_s_R, best_o_R


def weighted_sum(squares_OC: Tensor, importance: Tensor) -> Tensor:
    """The sum over each row, ``O``; importance one a column or one a weight."""
    return squares_OC @ importance if importance.ndim == 1 else (squares_OC * importance).sum(1)
