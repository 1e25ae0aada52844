"""The change that plain rounding makes, found in a fraction of a warm start's time."""

from __future__ import annotations

import functools

from torch import Tensor

from lightning_gsq.quantizers.rtn import round_groups
from lightning_gsq.quantizers.scale_search import search_scale
from lightning_gsq.quantizers.warm_start import Start, WarmStart
from lightning_gsq.weights.scheme import QuantScheme

STEPS = 8
"""Scales that are tried for a group, of either sign; a warm start tries five times as many."""


class QuickRounding(WarmStart):
    """Round to nearest, weighted by the inputs' second moments where they are given."""

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`."""
        importance_I = None if hessian_II is None or not bool(hessian_II.any()) else hessian_II.diagonal()
        return round_groups(w_OI, scheme, importance_I, functools.partial(search_scale, steps=STEPS))
