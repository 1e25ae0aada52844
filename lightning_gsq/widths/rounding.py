"""The change that plain rounding makes, found in a fraction of a warm start's time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_gsq.quantizers.rtn import round_groups
from lightning_gsq.quantizers.scale_search import search_scale
from lightning_gsq.quantizers.warm_start import quantized, stack
from lightning_gsq.weights.scheme import QuantScheme

Change = Callable[[Tensor, Sequence[Tensor | None], QuantScheme, torch.dtype], Tensor]
"""What a way of rounding adds to a matrix, called as :func:`change_of` is."""
STEPS = 8
"""Scales that are tried for a group, of either sign; a warm start tries five times as many."""
ROWS = 8192
"""Rows that are rounded at once."""


def change_of(
    w_OI: Tensor, importances: Sequence[Tensor | None], scheme: QuantScheme, scale_dtype: torch.dtype
) -> Tensor:
    """What rounding to nearest adds to a matrix, fp32 ``O I``.

    Args:
        w_OI: fp32; the matrices of experts lie below one another.
        importances: For each of these, how much a squared error in each column counts, ``I``; None if all count alike.
        scheme: Grid and groups.
        scale_dtype: Stored dtype of scales that have none of their own.
    """
    rule = functools.partial(search_scale, steps=STEPS)
    starts = [
        round_groups(rows, scheme, None if own_I is None or not bool(own_I.any()) else own_I, rule)
        for part_OI, own_I in zip(w_OI.chunk(len(importances)), importances, strict=True)
        for rows in part_OI.split(ROWS)
    ]
    return quantized(stack(starts), scheme, scale_dtype).dequantize() - w_OI
