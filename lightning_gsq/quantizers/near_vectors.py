"""Which code vectors are near: what a trained group of four or eight weights chooses from.

A candidate is a vector with its signs (or its shift). Of all that the grid holds, those are taken whose squared error
against the full-precision weights, in units of the group's scale, is least; the present one is always the first.

With signs, the error of a vector is least where every weight has its own sign; where an even number of minus signs is
wanted and the weights have an odd one, the sign is flipped that costs least, which at weight ``x`` and entry ``v`` is
``4 |x| v``. The next best pattern of a vector flips one sign more (two, where the number has to stay even), so that a
weight near zero may change its sign whatever happens to the vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_gsq.system.slices import slices
from lightning_gsq.weights.vector_grid import EIGHTHS, VectorGrid, codes_of_vectors

AT_ONCE = 1 << 24
"""Errors, of groups against vectors, that are in memory at the same time."""


def near_codes(codes_OI: Tensor, position_OI: Tensor, grid: VectorGrid, count: int) -> Tensor:
    """The candidates of every group, and the present codes in front.

    Args:
        codes_OI: The present codes.
        position_OI: fp32, the full-precision weights over their scales.
        grid: The grid.
        count: Candidates, at least two.

    Returns:
        Codes ``L O I``.
    """
    present_RC, x_RC = codes_OI.reshape(-1, grid.unit), position_OI.reshape(-1, grid.unit).float()
    near = [
        _of_groups(present_RC[part], x_RC[part], grid, count)
        for part in slices(len(x_RC), max(1, AT_ONCE // (2 * grid.vectors.count)))
    ]
    return torch.cat(near, dim=1).reshape(count, *codes_OI.shape)


def _of_groups(present_RC: Tensor, x_RC: Tensor, grid: VectorGrid, count: int) -> Tensor:
    codes_RLC = _shifted(present_RC, x_RC, grid, count) if grid.vectors.shift_group else _signed(x_RC, grid, count)
    error_RL = (codes_RLC - x_RC[:, None]).square().sum(-1)
    error_RL = error_RL.masked_fill((codes_RLC == present_RC[:, None]).all(-1), torch.inf)
    best_RL = error_RL.topk(count - 1, dim=1, largest=False).indices
    near_RLC = codes_RLC.gather(1, best_RL[..., None].expand(-1, -1, grid.unit))
    return torch.cat([present_RC[None], near_RLC.transpose(0, 1).to(present_RC.dtype)])


def _shifted(present_RC: Tensor, x_RC: Tensor, grid: VectorGrid, count: int) -> Tensor:
    """The nearest vectors with their shift, ``R L C``; one that other groups share stays as it is."""
    codes_NC = codes_of_vectors(grid.vectors.name).to(x_RC.device).float()
    if grid.vectors.shift_group > grid.unit:
        # A step of a vector is eight codes: what is left of the first one is the shift.
        shift_R1 = (present_RC[:, :1].float() + EIGHTHS // 2).remainder(EIGHTHS) - EIGHTHS // 2
        return _nearest(x_RC - shift_R1, codes_NC, count) + shift_R1[..., None]
    return _nearest(x_RC, torch.cat([codes_NC - 1, codes_NC + 1]), count)


def _signed(x_RC: Tensor, grid: VectorGrid, count: int) -> Tensor:
    """The nearest vectors, each with the best signs and with the next best, ``R L C``."""
    vectors, size_RC = grid.vectors, x_RC.abs()
    codes_NC = codes_of_vectors(vectors.name).to(x_RC.device).float()
    if vectors.length == grid.unit:
        entries_RMC = _nearest(size_RC, codes_NC, count)
    else:
        # Two vectors whose signs depend on each other: every pair of their nearest.
        few = math.ceil(math.sqrt(count)) + 1
        halves = [_nearest(half, codes_NC, few) for half in size_RC.split(vectors.length, dim=1)]
        pair = [
            half.repeat_interleave(few, 1) if first else half.repeat(1, few, 1) for first, half in enumerate(halves)
        ]
        entries_RMC = torch.cat(pair, dim=-1)
    negative_RMC = (x_RC < 0)[:, None].expand_as(entries_RMC)
    cost_RMC = size_RC[:, None] * entries_RMC
    cheapest_RM2 = cost_RMC.topk(2, dim=-1, largest=False).indices
    first, second = (torch.zeros_like(negative_RMC).scatter(-1, cheapest_RM2[..., i : i + 1], True) for i in (0, 1))
    if vectors.signs == "free":
        flips = (torch.zeros_like(first), first)
    else:
        odd_RM1 = negative_RMC.sum(-1, keepdim=True) % 2 == 1
        flips = (first & odd_RM1, torch.where(odd_RM1, second, first | second))
    return torch.cat([torch.where(negative_RMC ^ flip, -entries_RMC, entries_RMC) for flip in flips], dim=1)


def _nearest(x_RC: Tensor, codes_NC: Tensor, count: int) -> Tensor:
    """The ``count`` rows of ``codes_NC`` nearest to each row, ``R count C``."""
    score_RN = x_RC @ codes_NC.T - codes_NC.square().sum(1) / 2
    return codes_NC[score_RN.topk(count, dim=1).indices]
