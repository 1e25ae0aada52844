"""Scales in the form in which a layout stores them, found while a matrix is quantized from left to right.

Where a block of groups begins, a two-level layout takes the block's floats from the best real-valued scales of its
groups; each group then takes the integer whose scale, as it is stored, leaves the smallest error. So codes are found
for the scales that the file will have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.quantizers.scale_search import search_affine, search_scale, weighted_sum
from lightning_gsq.weights.layout import OFFSETS, SCALES, SUB_OFFSETS, SUB_SCALES
from lightning_gsq.weights.scheme import QuantScheme

ScaleRule = Callable[[Tensor, QuantScheme, Tensor | None], Tensor]
"""Finds the scale of one group a row from its weights, the scheme and the weights of their squared errors."""
NEIGHBOURS = (0, -1, 1)
"""Integers tried around the nearest one."""
Free = tuple[Tensor, Tensor | None]
"""Real-valued scales and offsets."""


@dataclass(frozen=True)
class GroupScales:
    """The scales of groups, each of which has a row of weights here.

    Args:
        s_R: fp32.
        o_R: fp32; None without an offset.
        may_vanish: Whether a scale can be zero.
    """

    s_R: Tensor
    o_R: Tensor | None = None
    may_vanish: bool = False

    def position(self, w: Tensor) -> Tensor:
        """Where weights ``R`` or ``R C`` lie on the grid, in its values; 0 under a scale of zero."""
        s, o = self._like(w)
        lifted = w if o is None else w - o
        return torch.where(s == 0, 0, lifted / s) if self.may_vanish else lifted / s

    def weight(self, values: Tensor) -> Tensor:
        """The weights of these values of the grid."""
        s, o = self._like(values)
        return values * s if o is None else values * s + o

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = (-1, *[1] * (x.ndim - 1))
        return self.s_R.view(shape), None if self.o_R is None else self.o_R.view(shape)


class ScaleFit:
    """The scales of one matrix while it is quantized from left to right.

    Args:
        scheme: Grid, groups, layout.
        importance_I: Weights of the squared errors, one a column; None if there are none.
        rule: Finds the scale of a group in a layout of one float a group.
    """

    def __init__(self, scheme: QuantScheme, importance_I: Tensor | None, rule: ScaleRule) -> None:
        self.scheme, self.layout = scheme, scheme.layout
        self.importance_I, self.rule = importance_I, rule
        self._columns: dict[str, list[Tensor]] = {}
        self._floats: dict[str, Tensor] = {}

    def begins_block(self, column: int) -> bool:
        """Whether :meth:`open_block` is wanted here."""
        return self.layout.block > 0 and column % self.layout.block == 0

    def open_block(self, w_OB: Tensor, start: int) -> Free:
        """Fixes the floats of a block of a two-level layout.

        Args:
            w_OB: fp32, the block's weights.
            start: Its first column.

        Returns:
            The real-valued scales and offsets, group by group, that :meth:`groups` can go on from.
        """
        assert self.layout.sub_scales is not None
        w_RC = w_OB.reshape(-1, self.scheme.group_size)
        s_R, o_R = self._free(w_RC, self._importance(start, w_OB.shape[1], w_OB.shape[0]))
        s_OG = s_R.view(len(w_OB), -1)
        largest_O1 = s_OG.gather(1, s_OG.abs().argmax(1, keepdim=True))
        # Signed integers reach further down than up: the largest scale takes the lowest, with the sign that this gives.
        end = self.layout.sub_scales.low or self.layout.sub_scales.high
        self._floats[SCALES] = self._keep(SCALES, largest_O1 / end)[:, 0]
        if o_R is not None and self.layout.sub_offsets is not None:
            lowest_O1 = o_R.view(len(w_OB), -1).amin(1, keepdim=True)
            self._floats[OFFSETS] = self._keep(OFFSETS, lowest_O1 / self.layout.sub_offsets.high)[:, 0]
        return s_R, o_R

    def groups(self, w_OB: Tensor, start: int, free: Free | None = None) -> GroupScales:
        """The scales of the groups that begin at column ``start``: one, or several of the full length.

        Args:
            w_OB: Their weights as they stand; row below row they are those of the result.
            start: The first column.
            free: What :meth:`open_block` returned, where the weights are the same.
        """
        rows, width = w_OB.shape
        count = max(1, width // self.scheme.group_length(width))
        w_RC, importance = w_OB.reshape(rows * count, -1), self._importance(start, width, rows)
        if self.layout.sub_scales is not None:
            return self._integers(w_RC, importance, count, free or self._free(w_RC, importance))
        if not self.layout.offset:
            s_R = self.rule(w_RC, self.scheme, importance)
            s_OG = self._keep(SCALES, s_R.view(rows, count))
            return GroupScales(s_OG.reshape(-1), None, self.layout.dtype is not None)
        s_R, o_R = search_affine(w_RC, self.scheme, importance)
        s_OG, o_OG = self._keep(SCALES, s_R.view(rows, count)), self._keep(OFFSETS, o_R.view(rows, count))
        return GroupScales(s_OG.reshape(-1), o_OG.reshape(-1), may_vanish=True)

    def parts(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The scales ``O G`` (or ``O B``) and what else the layout stores, by name."""
        joined = {name: torch.cat(values, dim=1) for name, values in self._columns.items()}
        return joined.pop(SCALES), joined

    def _keep(self, name: str, value_OG: Tensor) -> Tensor:
        """Stores some columns, and returns them as fp32, rounded if the layout fixes how they are stored."""
        if self.layout.dtype is not None or name in (SUB_SCALES, SUB_OFFSETS):
            value_OG = self.layout.stored(name, value_OG, torch.float32).float()
        self._columns.setdefault(name, []).append(value_OG)
        return value_OG

    def _free(self, w_RC: Tensor, importance: Tensor | None) -> Free:
        """The best real-valued scale of each row, and its offset."""
        if self.layout.offset:
            return search_affine(w_RC, self.scheme, importance, sinking=True)
        return search_scale(w_RC, self.scheme, importance), None

    def _importance(self, start: int, width: int, rows: int) -> Tensor | None:
        """That of some columns: one a column for a single group, else one a weight of groups row below row."""
        if self.importance_I is None:
            return None
        importance = self.importance_I[start : start + width]
        length = self.scheme.group_length(width)
        return (
            importance if length == width else importance.view(1, -1, length).expand(rows, -1, -1).reshape(-1, length)
        )

    def _integers(self, w_RC: Tensor, importance: Tensor | None, count: int, free: Free) -> GroupScales:
        """The integers of groups under the floats of their block: neighbours of the best real-valued ones are tried."""
        layout, grid, (s_R, o_R) = self.layout, self.scheme.grid, free
        d_R = self._floats[SCALES].repeat_interleave(count)
        dmin_R = self._floats[OFFSETS].repeat_interleave(count) if layout.offset else None
        h = torch.ones_like(w_RC[0]) if importance is None else importance
        assert layout.sub_scales is not None
        wanted_R = torch.where(d_R == 0, 0, s_R / d_R).round()
        best_error_R = torch.full_like(s_R, torch.inf)
        best: dict[str, Tensor] = {}
        for step in NEIGHBOURS:
            for offset_step in NEIGHBOURS if layout.offset else (0,):
                tried = {SUB_SCALES: layout.sub_scales.nearest(wanted_R + step)}
                if dmin_R is not None and o_R is not None and layout.sub_offsets is not None:
                    m_R = torch.where(dmin_R == 0, 0, o_R / dmin_R).round()
                    tried[SUB_OFFSETS] = layout.sub_offsets.nearest(m_R + offset_step)
                scales = _under(d_R, dmin_R, tried)
                error_RC = w_RC - scales.weight(grid.value_of(grid.nearest(scales.position(w_RC))))
                error_R = weighted_sum(error_RC.square(), h)
                better_R = error_R < best_error_R
                best_error_R = torch.where(better_R, error_R, best_error_R)
                best = {name: torch.where(better_R, value, best.get(name, value)) for name, value in tried.items()}
        rounded = {name: self._keep(name, value.view(-1, count)).reshape(-1) for name, value in best.items()}
        return _under(d_R, dmin_R, rounded)


def _under(d_R: Tensor, dmin_R: Tensor | None, integers: dict[str, Tensor]) -> GroupScales:
    offset_R = None if dmin_R is None else dmin_R * integers[SUB_OFFSETS]
    return GroupScales(d_R * integers[SUB_SCALES], offset_R, may_vanish=True)
