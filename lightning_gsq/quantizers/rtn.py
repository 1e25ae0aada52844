"""Round to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.quantizers.layout_fit import ScaleFit, ScaleRule
from lightning_gsq.quantizers.scale_search import search_scale
from lightning_gsq.quantizers.warm_start import Start, WarmStart, check_inputs
from lightning_gsq.weights.scheme import QuantScheme


class RTN(WarmStart):
    """Round to nearest, each group's scale chosen for the smallest error.

    Args:
        weighted: Weigh each weight's squared error by its input's second moment (the diagonal of the Hessian), so
            that a scale clips where it does not matter; otherwise ``|error|^2.4`` of the weights alone.
    """

    diagonal_only = True

    def __init__(self, weighted: bool = True) -> None:
        self.needs_hessian = self.weighted = weighted

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`."""
        check_inputs(self, w_OI, hessian_II)
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
    (rows, columns), grid, fit = w_OI.shape, scheme.grid, ScaleFit(scheme, importance_I, scale)
    # The weights do not change on the way, so that what a layout shares among groups is found for all of them at once.
    length = scheme.group_length(columns)
    step = scheme.layout.block or (columns if scheme.layout.offset and columns % length == 0 else length)
    positions = []
    for start in range(0, columns, step):
        w_OB = w_OI[:, start : start + step]
        free = fit.open_block(w_OB, start) if fit.begins_block(start) else None
        scales = fit.groups(w_OB, start, free)
        groups = len(scales.s_R) // rows
        positions.append(scales.position(w_OB.reshape(rows * groups, -1)).view(rows, -1))
    position_OI = torch.cat(positions, dim=1)
    scales_OG, others = fit.parts()
    codes_OI = grid.nearest(position_OI).to(grid.code_dtype)
    return Start(codes_OI, scales_OG, grid.coordinate(position_OI), others)
