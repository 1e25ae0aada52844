"""Sweeps over the groups of a matrix: the best stored scales for the codes, then the best codes for the scales.

The error of a matrix's outputs over the calibration inputs is a quadratic form of the matrix's error,

    sum over rows of (w - v) H (w - v)ᵀ,        v = s[g] * value(code) + o[g]

so that the best scale (and offset) of one group, the best floats of one block of groups, and the best code of one
weight have closed forms while everything else stays. Each is taken as it is stored, where it makes the error smaller.
The best of some near code vectors, where weights choose their codes together, is found by trying them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.quantizers.near_vectors import near_codes
from lightning_gsq.quantizers.warm_start import Start
from lightning_gsq.system.slices import slices
from lightning_gsq.weights.layout import FLOATS, OFFSETS, SCALES, SUB_OFFSETS, SUB_SCALES, ScaleLayout
from lightning_gsq.weights.quantized import expand_groups
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.vector_grid import VectorGrid

SINGULAR = 1e-6
"""Below this share of its largest possible value a determinant counts as zero."""
NEAR = 4
"""Code vectors that a group of weights chooses from; with two the error ends 0.7 % higher, with 16 the same."""

Pair = tuple[Tensor, Tensor | None]
"""What belongs to a scale, and to an offset where there is one."""


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
    columns, length = w_OI.shape[1], scheme.group_length(w_OI.shape[1])
    codes_OI, position_OI = start.codes_OI.float(), start.position_OI.clone()
    parts = {name: value.clone() for name, value in start.scale_parts.items()}
    value_OI = scheme.grid.value_of(codes_OI) * expand_groups(scheme.layout.scales(parts), columns, length)
    offsets_OG = scheme.layout.offsets(parts)
    if offsets_OG is not None:
        value_OI = value_OI + expand_groups(offsets_OG, columns, length)
    slope_OI = (w_OI - value_OI) @ hessian_II
    groups = list(slices(columns, length))
    blocks = list(slices(columns, scheme.layout.block)) if scheme.layout.block else []
    moments_G = torch.stack([hessian_II.diagonal()[part].mean() for part in groups])
    order = moments_G.argsort(descending=True, stable=True).tolist()

    def span_of(part: slice) -> _Span:
        return _Span.of(codes_OI[:, part], value_OI[:, part], slope_OI[:, part], hessian_II[part, part])

    def settle(part: slice, span: _Span) -> None:
        slope_OI.sub_((span.value_LO.T - value_OI[:, part]) @ hessian_II[part])
        codes_OI[:, part], value_OI[:, part] = span.codes_LO.T, span.value_LO.T

    for _ in range(sweeps):
        for number, part in enumerate(blocks):
            block = span_of(part)
            block.improve_floats(parts, number, scheme)
            settle(part, block)
        for number in order:
            part = groups[number]
            group = span_of(part)
            s_O, o_O = group.improve_scale(parts, number, scheme)
            position_OI[:, part] = group.improve_codes(s_O, o_O, scheme).T
            settle(part, group)
    return Start(codes_OI.to(scheme.grid.code_dtype), parts.pop(SCALES), position_OI, parts)


@dataclass
class _Span:
    """Some neighbouring weights of every row, columns first, so that each lies in one piece.

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
    def of(cls, codes_OL: Tensor, value_OL: Tensor, slope_OL: Tensor, h_LL: Tensor) -> _Span:
        """Of rows first."""

        def columns_first(x_OL: Tensor) -> Tensor:
            return x_OL.T.clone(memory_format=torch.contiguous_format)

        return cls(columns_first(codes_OL), columns_first(value_OL), columns_first(slope_OL), h_LL)

    def improve_scale(self, parts: dict[str, Tensor], number: int, scheme: QuantScheme) -> Pair:
        """Takes the best stored scale and offset of a group for these codes where that helps.

        Args:
            parts: What is stored for the scales of the matrix; changed.
            number: The group's number in its row.
            scheme: Grid, groups, layout.

        Returns:
            fp32 scales ``O`` and offsets ``O``, if there are any, as they are now.
        """
        layout, q_LO = scheme.layout, scheme.grid.value_of(self.codes_LO)
        own = {name: parts[name][:, column : column + 1] for name, column in _columns(parts, number, scheme).items()}
        s_O1, o_O1 = layout.scales(own), layout.offsets(own)
        basis = q_LO, None if o_O1 is None else torch.ones_like(q_LO)
        step_O, offset_step_O = self._best_steps(*basis)
        s_best_O1, o_best_O1 = s_O1 + step_O[:, None], None if o_O1 is None else o_O1 + offset_step_O[:, None]
        tried = own | _stored(own, s_best_O1, o_best_O1, layout)
        better_O1 = self._take(basis, (s_O1, o_O1), (layout.scales(tried), layout.offsets(tried)))
        for name, value_O1 in own.items():
            value_O1.copy_(torch.where(better_O1, tried[name], value_O1))
        o_O1 = layout.offsets(own)
        return layout.scales(own)[:, 0], None if o_O1 is None else o_O1[:, 0]

    def improve_floats(self, parts: dict[str, Tensor], number: int, scheme: QuantScheme) -> None:
        """Takes the best stored floats of a block of groups for these codes and integers, where that helps.

        Args:
            parts: What is stored for the scales of the matrix; changed.
            number: The block's number in its row.
            scheme: Grid, groups, layout.
        """
        layout, length = scheme.layout, scheme.group_size
        first = number * (layout.block // length)
        own = {
            n: value[:, first : first + len(self.codes_LO) // length] for n, value in parts.items() if n not in FLOATS
        }
        floats = {n: parts[n][:, number : number + 1] for n in FLOATS if n in parts}
        factors_OG, offsets_OG = layout.factors(own), own.get(SUB_OFFSETS)
        assert factors_OG is not None
        q_LO = scheme.grid.value_of(self.codes_LO) * factors_OG.float().repeat_interleave(length, 1).T
        basis = q_LO, None if offsets_OG is None else offsets_OG.float().repeat_interleave(length, 1).T
        steps = dict(zip(FLOATS, self._best_steps(*basis), strict=True))
        wanted = {n: value_O1 + steps[n][:, None] for n, value_O1 in floats.items()}
        tried = {n: layout.stored(n, value_O1, torch.float32).float() for n, value_O1 in wanted.items()}
        better_O1 = self._take(basis, (floats[SCALES], floats.get(OFFSETS)), (tried[SCALES], tried.get(OFFSETS)))
        for name, value_O1 in floats.items():
            value_O1.copy_(torch.where(better_O1, tried[name], value_O1))

    def _take(self, basis: Pair, present: Pair, tried: Pair) -> Tensor:
        """Moves the rows whose error other numbers make smaller; which these are, ``O 1``.

        What is stored is rounded, so that the step is another one than the best.
        """
        move_LO = basis[0] * (tried[0] - present[0]).T
        if basis[1] is not None and tried[1] is not None and present[1] is not None:
            move_LO = move_LO + basis[1] * (tried[1] - present[1]).T
        gain_O = (move_LO * (2 * self.slope_LO - self.h_LL @ move_LO)).sum(0)
        better_O1 = (gain_O > 0)[:, None]
        move_LO = torch.where(better_O1.T, move_LO, 0)
        self.value_LO += move_LO
        self.slope_LO -= self.h_LL @ move_LO
        return better_O1

    def _best_steps(self, q_LO: Tensor, p_LO: Tensor | None) -> tuple[Tensor, Tensor]:
        """The steps ``O`` along ``q`` and ``p`` that make the squared error least; no step of what cannot move."""
        hq_LO, none_O = self.h_LL @ q_LO, torch.zeros_like(q_LO[0])
        qq_O, slope_q_O = (q_LO * hq_LO).sum(0), (q_LO * self.slope_LO).sum(0)
        if p_LO is None:
            return torch.where(qq_O > 0, slope_q_O / qq_O, 0), none_O
        qp_O, pp_O, slope_p_O = (
            (p_LO * hq_LO).sum(0),
            (p_LO * (self.h_LL @ p_LO)).sum(0),
            (p_LO * self.slope_LO).sum(0),
        )
        determinant_O = qq_O * pp_O - qp_O.square()
        # Where all codes are the same, scale and offset do the same, and the offset alone moves.
        apart_O = determinant_O > SINGULAR * qq_O * pp_O
        return (
            torch.where(apart_O, (slope_q_O * pp_O - slope_p_O * qp_O) / determinant_O, 0),
            torch.where(
                apart_O,
                (slope_p_O * qq_O - slope_q_O * qp_O) / determinant_O,
                torch.where(pp_O > 0, slope_p_O / pp_O, 0),
            ),
        )

    def improve_codes(self, s_O: Tensor, o_O: Tensor | None, scheme: QuantScheme) -> Tensor:
        """Takes the best codes for these scales; returns positions ``L O``."""
        if isinstance(scheme.grid, VectorGrid):
            return self._improve_vectors(s_O, scheme.grid)
        grid, position_LO, vanished_O = scheme.grid, torch.empty_like(self.codes_LO), s_O == 0
        vanish, moments = bool(vanished_O.any()), self.h_LL.diagonal()
        columns = zip(
            *(x_LO.unbind() for x_LO in (self.codes_LO, self.value_LO, self.slope_LO, self.h_LL)), strict=True
        )
        of = list(zip(columns, position_LO.unbind(), moments.tolist(), strict=True))
        for c in moments.argsort(descending=True, stable=True).tolist():  # the largest second moment first
            (code_O, value_O, slope_O, h_L), at_O, moment = of[c]
            lifted_O = torch.add(value_O, slope_O, alpha=1 / moment)
            if o_O is not None:
                lifted_O -= o_O
            position_O = lifted_O / s_O
            if vanish:
                position_O.masked_fill_(vanished_O, 0)
            code_O.copy_(grid.nearest(position_O))
            new_O = grid.value_of(code_O) * s_O
            if o_O is not None:
                new_O += o_O
            self.slope_LO.addr_(h_L, new_O - value_O, alpha=-1)
            value_O.copy_(new_O)
            at_O.copy_(grid.coordinate(position_O))
        return position_LO

    def _improve_vectors(self, s_O: Tensor, grid: VectorGrid) -> Tensor:
        """One vector after the other: of the nearest to what its weights should be, the one of the least error."""
        position_LO = torch.empty_like(self.codes_LO)
        for first in range(0, len(self.codes_LO), grid.unit):
            part = slice(first, first + grid.unit)
            h_UU = self.h_LL[part, part]
            wanted_OU = (self.value_LO[part] + torch.linalg.solve(h_UU, self.slope_LO[part])).T
            codes_OU = self.codes_LO[part].T.to(grid.code_dtype)
            position_OU = torch.where(s_O[:, None] == 0, codes_OU, wanted_OU / s_O[:, None])
            near_KOU = near_codes(codes_OU, position_OU, grid, NEAR).float()
            off_KOU = wanted_OU - near_KOU * s_O[:, None]
            best_O = ((off_KOU @ h_UU) * off_KOU).sum(-1).argmin(0)
            code_OU = near_KOU[best_O, torch.arange(len(best_O), device=best_O.device)]
            move_UO = (code_OU * s_O[:, None]).T - self.value_LO[part]
            self.slope_LO -= self.h_LL[:, part] @ move_UO
            self.value_LO[part] += move_UO
            self.codes_LO[part], position_LO[part] = code_OU.T, position_OU.T
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
        factors = {n: torch.where(own[n] == 0, 0, value_O1 / own[n]) for n, value_O1 in wanted.items()}
        factors[SCALES] = layout.integers(factors[SCALES])
        wanted = {integers[name]: factor_O1 for name, factor_O1 in factors.items()}
    elif layout.dtype is None:  # rounded at the end, to the run's own dtype
        return wanted
    return {name: layout.stored(name, value_O1, torch.float32).float() for name, value_O1 in wanted.items()}
