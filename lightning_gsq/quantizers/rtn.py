"""Round to nearest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_gsq.quantizers.scale_search import search_scale
from lightning_gsq.quantizers.warm_start import Start, WarmStart
from lightning_gsq.weights.scheme import QuantScheme

ScaleRule = Callable[[Tensor, QuantScheme, Tensor | None], Tensor]
"""Finds the scale of one group a row from its weights, the scheme and the weights of their squared errors."""


class RTN(WarmStart):
    """Round to nearest, each group's scale chosen for the smallest error.

    Args:
        weighted: Weigh each weight's squared error by its input's second moment (the diagonal of the Hessian), so
            that a scale clips where it does not matter; otherwise ``|error|^2.4`` of the weights alone.
    """

    def __init__(self, weighted: bool = False) -> None:
        self.needs_hessian = self.weighted = weighted

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`."""
        importance_I = hessian_II.diagonal() if self.weighted and hessian_II is not None else None
        if importance_I is not None and not bool(importance_I.any()):  # no token came here
            importance_I = None
        return round_groups(w_OI, scheme, importance_I, search_scale)


def round_groups(w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor | None, scale: ScaleRule) -> Start:
    """Rounds to nearest, group by group.

    Args:
        w_OI: fp32 weight.
        scheme: Grid and group size.
        importance_I: Weights of the squared errors, one a column; None if there are none.
        scale: Finds the scale of one group a row from its weights, the scheme and the group's importance.
    """
    length = scheme.group_length(w_OI.shape[1])
    scales, positions = [], []
    for start in range(0, w_OI.shape[1], length):
        w_OC = w_OI[:, start : start + length]
        s_O = scale(w_OC, scheme, None if importance_I is None else importance_I[start : start + length])
        scales.append(s_O)
        positions.append(w_OC / s_O[:, None])
    position_OI = torch.cat(positions, dim=1)
    return Start(scheme.grid.nearest(position_OI).to(torch.int8), torch.stack(scales, dim=1), position_OI)
