"""Codes and scales in turn, each the best for the others as they stand: coordinate descent on the outputs' error.

The error of a matrix's outputs over the calibration inputs is a quadratic form of the matrix's error,

    sum over rows of (w - v) H (w - v)ᵀ,        v = s[g] * value(code) + o[g]

so that the best scale (and offset) of one group, and the best code of one weight, have closed forms while everything
else stays. GPTQ never comes back to a code; here each is looked at again, sweep after sweep, for the scales in the form
in which they are stored, and no step makes the error larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers.gptq import FOLLOW_DAMPING, GPTQ, damped
from lightning_gsq.quantizers.warm_start import Start
from lightning_gsq.weights.layout import FLOATS, OFFSETS, SCALES, SUB_OFFSETS, SUB_SCALES, ScaleLayout
from lightning_gsq.weights.quantized import expand_groups
from lightning_gsq.weights.scheme import QuantScheme

SINGULAR = 1e-6
"""Below this share of its largest possible value a determinant counts as zero."""


class LeastSquares(GPTQ):
    """GPTQ, then sweeps over the groups: the scale of a group, then its codes, one column after the other.

    Args:
        sweeps: How often each group is looked at again; a sweep takes less time than GPTQ itself.
        damping: As of :class:`~lightning_gsq.quantizers.gptq.GPTQ`; the sweeps see the damped Hessian too.
        block_columns: As there.
        weighted: As there.
        activation_order: As there.
        follow: As there, but it does unless told otherwise.
        follow_damping: As there.
    """

    def __init__(
        self,
        sweeps: int = 4,
        damping: float = 0.01,
        block_columns: int = 128,
        weighted: bool = True,
        activation_order: bool = True,
        follow: bool = True,
        follow_damping: float = FOLLOW_DAMPING,
    ) -> None:
        super().__init__(damping, block_columns, weighted, activation_order, follow, follow_damping)
        if sweeps < 1:
            raise ConfigurationError(f"warm_start.sweeps must be positive, got {sweeps}; without sweeps it is GPTQ")
        self.sweeps = sweeps

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`."""
        start = super().__call__(w_OI, hessian_II, scheme)
        if hessian_II is None or not bool(hessian_II.any()):
            return start
        return descend(start, w_OI.float(), damped(hessian_II, self.damping), scheme, self.sweeps)


def descend(start: Start, w_OI: Tensor, hessian_II: Tensor, scheme: QuantScheme, sweeps: int) -> Start:
    """Improves scales and codes until so many sweeps are done.

    Args:
        start: What to begin with.
        w_OI: fp32, the weights that it stands for.
        hessian_II: fp32, positive definite.
        scheme: Grid, groups, layout.
        sweeps: Passes over all groups, those of the largest second moments first.

    Returns:
        A start whose error under the Hessian is not larger.
    """
    columns, length, layout = w_OI.shape[1], scheme.group_length(w_OI.shape[1]), scheme.layout
    codes_OI, position_OI = start.codes_OI.float(), start.position_OI.clone()
    parts = {name: value.clone() for name, value in start.scale_parts.items()}
    value_OI = scheme.grid.value_of(codes_OI) * expand_groups(layout.scales(parts), columns, length)
    offsets_OG = layout.offsets(parts)
    if offsets_OG is not None:
        value_OI = value_OI + expand_groups(offsets_OG, columns, length)
    slope_OI = (w_OI - value_OI) @ hessian_II
    groups = [slice(first, min(first + length, columns)) for first in range(0, columns, length)]
    moments_G = torch.stack([hessian_II.diagonal()[part].mean() for part in groups])
    order = moments_G.argsort(descending=True, stable=True).tolist()
    for _ in range(sweeps):
        for number in order:
            part = groups[number]
            group = _Group.of(codes_OI[:, part], value_OI[:, part], slope_OI[:, part], hessian_II[part, part])
            s_O, o_O = group.improve_scale(parts, number, scheme)
            position_OI[:, part] = group.improve_codes(s_O, o_O, scheme).T
            slope_OI -= (group.value_LO.T - value_OI[:, part]) @ hessian_II[part]
            codes_OI[:, part], value_OI[:, part] = group.codes_LO.T, group.value_LO.T
    return Start(codes_OI.to(scheme.grid.code_dtype), parts.pop(SCALES), position_OI, parts)


@dataclass
class _Group:
    """The weights of one group of every row, columns first, so that each lies in one piece.

    Args:
        codes_LO: Their codes.
        value_LO: What they amount to.
        slope_LO: The error of all weights times the Hessian: half of how fast the squared error falls with each.
        h_LL: The Hessian among them.
    """

    codes_LO: Tensor
    value_LO: Tensor
    slope_LO: Tensor
    h_LL: Tensor

    @classmethod
    def of(cls, codes_OL: Tensor, value_OL: Tensor, slope_OL: Tensor, h_LL: Tensor) -> _Group:
        """Of rows first."""

        def columns_first(x_OL: Tensor) -> Tensor:
            return x_OL.T.clone(memory_format=torch.contiguous_format)

        return cls(columns_first(codes_OL), columns_first(value_OL), columns_first(slope_OL), h_LL)

    def improve_scale(self, parts: dict[str, Tensor], number: int, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
        """Takes the best stored scale and offset for these codes where that helps; returns what holds then.

        Args:
            parts: What is stored for the scales of the matrix; changed.
            number: The group's number in its row.
            scheme: Grid, groups, layout.

        Returns:
            fp32 scales ``O`` and offsets ``O``, if there are any.
        """
        layout, q_LO = scheme.layout, scheme.grid.value_of(self.codes_LO)
        own = {name: parts[name][:, column : column + 1] for name, column in _columns(parts, number, scheme).items()}
        s_O1, o_O1 = layout.scales(own), layout.offsets(own)
        step_O, offset_step_O = self._best_steps(q_LO, o_O1 is not None)
        s_best_O1, o_best_O1 = s_O1 + step_O[:, None], None if o_O1 is None else o_O1 + offset_step_O[:, None]
        tried = own | _stored(own, s_best_O1, o_best_O1, layout)
        o_tried_O1 = layout.offsets(tried)
        move_LO = q_LO * (layout.scales(tried) - s_O1).T
        if o_O1 is not None and o_tried_O1 is not None:
            move_LO = move_LO + (o_tried_O1 - o_O1).T
        # What is stored is rounded, so that the step is another one than the best: it is taken where it helps.
        gain_O = (move_LO * (2 * self.slope_LO - self.h_LL @ move_LO)).sum(0)
        better_O1 = (gain_O > 0)[:, None]
        for name, value_O1 in own.items():
            value_O1.copy_(torch.where(better_O1, tried[name], value_O1))
        move_LO = torch.where(better_O1.T, move_LO, 0)
        self.value_LO += move_LO
        self.slope_LO -= self.h_LL @ move_LO
        o_O1 = layout.offsets(own)
        return layout.scales(own)[:, 0], None if o_O1 is None else o_O1[:, 0]

    def _best_steps(self, q_LO: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
        """The steps ``O`` of scale and offset that make the squared error least; no step of what cannot move."""
        hq_LO, none_O = self.h_LL @ q_LO, torch.zeros_like(q_LO[0])
        qq_O, slope_q_O = (q_LO * hq_LO).sum(0), (q_LO * self.slope_LO).sum(0)
        if not offset:
            return torch.where(qq_O > 0, slope_q_O / qq_O, 0), none_O
        q1_O, one, slope_1_O = hq_LO.sum(0), self.h_LL.sum(), self.slope_LO.sum(0)
        determinant_O = qq_O * one - q1_O.square()
        # Where all codes are the same, scale and offset do the same, and the offset alone moves.
        apart_O = determinant_O > SINGULAR * qq_O * one
        return (
            torch.where(apart_O, (slope_q_O * one - slope_1_O * q1_O) / determinant_O, 0),
            torch.where(apart_O, (slope_1_O * qq_O - slope_q_O * q1_O) / determinant_O, slope_1_O / one),
        )

    def improve_codes(self, s_O: Tensor, o_O: Tensor | None, scheme: QuantScheme) -> Tensor:
        """Each column in turn takes the best codes, the largest second moment first; returns positions ``L O``."""
        grid, position_LO = scheme.grid, torch.empty_like(self.codes_LO)
        for c in self.h_LL.diagonal().argsort(descending=True, stable=True).tolist():
            wanted_O = self.value_LO[c] + self.slope_LO[c] / self.h_LL[c, c]
            lifted_O = wanted_O if o_O is None else wanted_O - o_O
            position_O = torch.where(s_O == 0, 0, lifted_O / s_O)
            self.codes_LO[c] = grid.nearest(position_O)
            value_O = grid.value_of(self.codes_LO[c]) * s_O
            if o_O is not None:
                value_O += o_O
            self.slope_LO -= self.h_LL[c][:, None] * (value_O - self.value_LO[c])
            self.value_LO[c], position_LO[c] = value_O, grid.coordinate(position_O)
        return position_LO


def _columns(parts: Mapping[str, Tensor], number: int, scheme: QuantScheme) -> dict[str, int]:
    """Where a group's numbers lie in each of the parts; floats that a block of groups shares lie at the block's."""
    block = scheme.layout.block
    shared = number * scheme.group_size // block if block else number
    return {name: shared if name in FLOATS else number for name in parts}


def _stored(own: Mapping[str, Tensor], s_O1: Tensor, o_O1: Tensor | None, layout: ScaleLayout) -> dict[str, Tensor]:
    """What is stored for a scale and an offset, as near as the layout comes; a block's floats stay."""
    wanted = {SCALES: s_O1} if o_O1 is None else {SCALES: s_O1, OFFSETS: o_O1}
    if layout.block:
        integers = {SCALES: SUB_SCALES, OFFSETS: SUB_OFFSETS}
        wanted = {
            integers[name]: torch.where(own[name] == 0, 0, value_O1 / own[name]) for name, value_O1 in wanted.items()
        }
    elif layout.dtype is None:  # rounded at the end, to the run's own dtype
        return wanted
    return {name: layout.stored(name, value_O1, torch.float32).float() for name, value_O1 in wanted.items()}
