"""The change that plain rounding makes, found in a fraction of a warm start's time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_gsq.quantizers.rtn import round_groups
from lightning_gsq.quantizers.salient_start import mixed_tensor
from lightning_gsq.quantizers.scale_search import search_scale
from lightning_gsq.quantizers.warm_start import quantized, stack
from lightning_gsq.saliency.budget import column_errors
from lightning_gsq.weights.mixed import MixedTensor, other_columns
from lightning_gsq.weights.salient_part import column_count
from lightning_gsq.weights.scheme import QuantScheme

Change = Callable[[Tensor, Sequence[Tensor | None], QuantScheme, torch.dtype], Tensor]
"""What a way of rounding adds to a matrix, called as :func:`change_of` is."""
STEPS = 8
"""Scales that are tried for a group, of either sign; a warm start tries five times as many."""
ROWS = 8192
"""Rows that are rounded at once."""
RULE = functools.partial(search_scale, steps=STEPS)


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
    if scheme.mixed:
        (own_I,) = importances
        return _mixed(w_OI, own_I, scheme, scale_dtype).dequantize() - w_OI
    starts = [
        round_groups(rows, scheme, _counting(own_I), RULE)
        for part_OI, own_I in zip(w_OI.chunk(len(importances)), importances, strict=True)
        for rows in part_OI.split(ROWS)
    ]
    return quantized(stack(starts), scheme, scale_dtype).dequantize() - w_OI


def _counting(importance_I: Tensor | None) -> Tensor | None:
    """None where no column counts: then all do alike."""
    return None if importance_I is None or not bool(importance_I.any()) else importance_I


def _mixed(w_OI: Tensor, importance_I: Tensor | None, scheme: QuantScheme, scale_dtype: torch.dtype) -> MixedTensor:
    """The matrix with the columns salient that gain most by it."""
    assert scheme.salient is not None and scheme.salient.ratio is not None
    moment_I = torch.ones_like(w_OI[0]) if _counting(importance_I) is None else importance_I
    assert moment_I is not None
    few_I, many_I = (column_errors(w_OI, moment_I, part) for part in (scheme.plain, scheme.salient_scheme))
    count = column_count(scheme.salient.ratio, w_OI.shape[1])
    columns_K = (few_I - many_I).argsort(descending=True, stable=True)[:count].sort().values

    def rounded(columns_C: Tensor, part: QuantScheme) -> tuple[Tensor, Tensor] | None:
        if not len(columns_C):
            return None
        start = round_groups(w_OI[:, columns_C], part, moment_I[columns_C], RULE)
        return start.codes_OI, start.scales_OG

    rest = rounded(other_columns(columns_K, w_OI.shape[1]), scheme.plain)
    assert rest is not None  # a step of columns is never salient
    return mixed_tensor(columns_K, rest, rounded(columns_K, scheme.salient_scheme), scheme, scale_dtype)
