"""The change that plain rounding makes, found in a fraction of a warm start's time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_gsq.models.linear_weights import LinearSite, watch_inputs
from lightning_gsq.quantizers.rtn import round_groups
from lightning_gsq.quantizers.scale_search import search_scale
from lightning_gsq.quantizers.warm_start import quantized, stack
from lightning_gsq.weights.scheme import QuantScheme

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


def importances_of(block: nn.Module, sites: Sequence[LinearSite], run: Callable[[], None]) -> dict[str, list[Tensor]]:
    """Sums of the squared inputs of each matrix, fp32 ``I`` for each of its experts, by the matrix's name.

    Args:
        block: The block.
        sites: Its matrices.
        run: Runs it over all sequences.
    """
    sums = {
        site.name: [
            torch.zeros(site.in_features, device=block.get_parameter(site.name).device)
            for _ in range(max(site.experts, 1))
        ]
        for site in sites
    }
    experts = {site.name: site.experts for site in sites}

    def add(name: str, expert: int, inputs: Tensor) -> None:
        if name in sums:  # a plain weight may be used a few rows at a time
            sums[name][expert if experts[name] else 0] += inputs.detach().float().flatten(0, -2).square().sum(0)

    with torch.no_grad(), watch_inputs(block, add):
        run()
    return sums
