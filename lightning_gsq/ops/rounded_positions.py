"""``w = scale * value(round(position)) + offset``, with the gradient of the unrounded position (straight through).

A position says where a weight lies between the codes of its grid, measured in codes. Its gradient is that of the weight
times the scale and the mean distance of two values, but for one that would push a position further beyond the ends of
the grid. The backward pass keeps the codes, one byte a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gsq.weights.grid import Grid
from lightning_gsq.weights.quantized import expand_groups, reduce_groups


class _RoundedPositions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        positions_OI: Tensor,
        scales_OG: Tensor,
        offsets_OG: Tensor | None,
        grid: Grid,
        group_length: int,
        dtype: torch.dtype,
    ) -> Tensor:
        codes_OI, columns = grid.code_at(positions_OI), positions_OI.shape[1]
        ctx.save_for_backward(positions_OI, codes_OI.to(grid.code_dtype), scales_OG)
        ctx.grid, ctx.group_length, ctx.with_offsets = grid, group_length, offsets_OG is not None
        w_OI = grid.value_of(codes_OI) * expand_groups(scales_OG, columns, group_length)
        if offsets_OG is not None:
            w_OI = w_OI + expand_groups(offsets_OG, columns, group_length)
        return w_OI.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        positions_OI, codes_OI, scales_OG = ctx.saved_tensors
        grid, length, grad_OI = ctx.grid, ctx.group_length, grads[0].float()
        scales = reduce_groups(grad_OI * grid.value_of(codes_OI), length)
        offsets = reduce_groups(grad_OI, length) if ctx.with_offsets else None
        slope = (grid.values[-1] - grid.values[0]) / (grid.high - grid.low)
        moved_OI = grad_OI.mul_(expand_groups(slope * scales_OG, grad_OI.shape[1], length))
        half = grid.step / 2
        outwards_OI = ((positions_OI > grid.high + half) & (moved_OI < 0)) | (
            (positions_OI < grid.low - half) & (moved_OI > 0)
        )
        return moved_OI.masked_fill_(outwards_OI, 0), scales, offsets, None, None, None


def rounded_positions(
    positions_OI: Tensor,
    scales_OG: Tensor,
    offsets_OG: Tensor | None,
    grid: Grid,
    group_length: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight ``O I``, differentiable in positions, scales and offsets.

    Args:
        positions_OI: fp32, in codes.
        scales_OG: fp32, one a group.
        offsets_OG: fp32, one a group; None where the layout has none.
        grid: The codes and what they are worth.
        group_length: Weights in a full group.
        dtype: Of the weight, rounded once.
    """
    result: Tensor = _RoundedPositions.apply(positions_OI, scales_OG, offsets_OG, grid, group_length, dtype)
    return result
