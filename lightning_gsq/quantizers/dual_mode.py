"""The dual-mode quantizer: several bits for salient weights, a sign and a shared scalar for all others.

The published form (SAGE-PTQ, arXiv 2606.05429) in the element layout: ``w = sign(w) * a[g]``, each unsalient weight in
the group ``g`` of the n whose scalar is nearest to its magnitude; salient weights have uniform codes and one scale an
output channel. Both sides alternate between assignment and least-squares scales until the error stops falling.
"Sign times the nearest of n scalars" is a scalar quantizer of ``1 + log2(n)`` bits, which is what its positions cost.

:class:`DualMode` is the same idea as a warm start for whole groups: least-squares scales, with the Hessian's error
feedback between columns (as BiLLM, arXiv 2402.04291, does for signs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.quantizers.gptq import FOLLOW_DAMPING, GPTQ
from lightning_gsq.quantizers.rtn import round_groups
from lightning_gsq.quantizers.scale_search import TINY, search_scale
from lightning_gsq.quantizers.warm_start import Start
from lightning_gsq.weights.element import ElementTensor
from lightning_gsq.weights.scheme import QuantScheme

MAX_ROUNDS = 100
CONVERGED = 1e-6
"""Relative fall of the error below which an alternation ends."""


@dataclass(frozen=True)
class ScaleGroups:
    """Values sorted into groups that share one scalar each.

    Args:
        scalars_n: Rising.
        members: Group of each value, int64, in the values' shape.
        error: Weighted squared error.
    """

    scalars_n: Tensor
    members: Tensor
    error: float


def group_scalars(values: Tensor, count: int, weights: Tensor | None = None) -> ScaleGroups:
    """Finds ``count`` scalars that represent all values with the least squared error, by alternation.

    In one dimension a group is an interval, so that a round is a few look-ups in cumulative sums of the sorted values.

    Args:
        values: Any shape, finite.
        count: Number of groups; fewer where there are fewer distinct values.
        weights: Weight of each value's squared error; None for one.
    """
    flat = values.detach().flatten().double()
    order = flat.argsort()
    x, h = flat[order], (torch.ones_like(flat) if weights is None else weights.detach().flatten().double()[order])
    zero = x.new_zeros(1)
    sums = [torch.cat([zero, part.cumsum(0)]) for part in (h, h * x, h * x * x)]
    scalars = x[((torch.arange(count, device=x.device) + 0.5) / count * len(x)).long()].unique()
    error = torch.inf
    for _ in range(MAX_ROUNDS):
        borders = torch.searchsorted(x, (scalars[1:] + scalars[:-1]) / 2)
        edges = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(x))])
        mass, first, second = (part[edges[1:]] - part[edges[:-1]] for part in sums)
        scalars = torch.where(mass > 0, first / mass.clamp_min(1e-300), scalars)
        now = float((second - first * scalars).clamp_min(0).sum())
        if not now < error * (1 - CONVERGED):
            break
        error = now
    members = torch.searchsorted((scalars[1:] + scalars[:-1]) / 2, flat).view(values.shape)
    return ScaleGroups(scalars.to(values.dtype), members, now)


def quantize_elements(
    w_OI: Tensor,
    mask_OI: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    moment_I: Tensor | None = None,
) -> ElementTensor:
    """The published quantizer: any weight salient, any other weight in any group.

    Args:
        w_OI: fp32 weight.
        mask_OI: bool, the salient weights.
        scheme: Settled, with an element layout.
        scale_dtype: Stored dtype of scales.
        moment_I: Weights of the squared errors, one a column; None for one.
    """
    assert scheme.salient is not None and isinstance(scheme.salient.scale_groups, int)
    rest = w_OI[~mask_OI]
    weights = None if moment_I is None else moment_I.expand_as(w_OI)[~mask_OI]
    groups = group_scalars(rest.abs(), scheme.salient.scale_groups, weights)
    table = groups.scalars_n
    if len(table) < scheme.salient.scale_groups:  # fewer distinct magnitudes than groups
        table = torch.cat([table, table[-1:].expand(scheme.salient.scale_groups - len(table))])
    salient = scheme.salient_scheme
    # A zero is represented without error whatever the scale is: the other weights of a row have no say.
    salient_OI = torch.where(mask_OI, w_OI, 0)
    s_O = fit_scale(salient_OI, salient, moment_I)
    codes_OI = salient.grid.nearest(salient_OI / s_O[:, None])
    return ElementTensor(
        mask_OI=mask_OI,
        salient_codes=codes_OI[mask_OI].to(torch.int8),
        salient_scales_O=s_O.to(scale_dtype),
        positive=rest >= 0,
        members=groups.members.to(torch.uint8),
        table_n=table.to(scale_dtype),
        scheme=scheme,
    )


def fit_scale(w_OC: Tensor, scheme: QuantScheme, moment_C: Tensor | None = None) -> Tensor:
    """The scale of one group a row: a search over shrunk ranges, then codes and least-squares scales in turn.

    Args:
        w_OC: fp32, the group's weights.
        scheme: The grid.
        moment_C: Weights of the squared errors, one a column; None for one.

    Returns:
        fp32 scales ``O``, never zero.
    """
    h_C = torch.ones_like(w_OC[0]) if moment_C is None else moment_C + TINY * moment_C.mean() + TINY
    if scheme.grid.binary:
        return ((w_OC.abs() @ h_C) / h_C.sum()).clamp_min(TINY)
    s_O = search_scale(w_OC, scheme, h_C)
    error = torch.inf
    for _ in range(MAX_ROUNDS):
        q_OC = scheme.grid.value_of(scheme.grid.nearest(w_OC / s_O[:, None]))
        power_O = q_OC.square() @ h_C
        s_O = torch.where(power_O > 0, (w_OC * q_OC) @ h_C / power_O.clamp_min(1e-30), s_O)
        s_O = torch.where(s_O.abs() < TINY, TINY, s_O)
        now = float(((w_OC - s_O[:, None] * q_OC).square() @ h_C).sum())
        if not now < error * (1 - CONVERGED):
            break
        error = now
    return s_O


class DualMode(GPTQ):
    """Least-squares scales: the mean magnitude for signs, alternating with the codes for more bits.

    Args:
        feedback: Move each column's error into the columns that follow, as GPTQ; otherwise round to nearest.
        weighted: Weigh squared errors by the inputs' second moments.
        damping: Added to the Hessian's diagonal, as a share of its mean.
        block_columns: Columns handled before the rest of the matrix is updated; affects speed only.
        follow: As of :class:`~lightning_gsq.quantizers.gptq.GPTQ`.
        follow_damping: As there.
    """

    def __init__(
        self,
        feedback: bool = True,
        weighted: bool = True,
        damping: float = 0.01,
        block_columns: int = 128,
        follow: bool = False,
        follow_damping: float = FOLLOW_DAMPING,
    ) -> None:
        super().__init__(damping, block_columns, weighted, False, follow, follow_damping)
        self.feedback = feedback
        self.needs_hessian, self.diagonal_only = feedback or weighted or follow, not (feedback or follow)

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`."""
        if self.feedback:
            return super().__call__(w_OI, hessian_II, scheme)
        moment_I = hessian_II.diagonal() if self.weighted and hessian_II is not None else None
        return round_groups(w_OI, scheme, moment_I, self.scale)

    def scale(self, w_OC: Tensor, scheme: QuantScheme, importance_C: Tensor | None) -> Tensor:
        """The scale of one group a row."""
        return fit_scale(w_OC, scheme, importance_C)
