"""What of the blocks is not quantized, and why, said before anything long starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from lightning_gsq.models.linear_weights import LinearSite

UNSEEN = "no matrix product with it was seen"
UNCHOSEN = "model.include and model.exclude leave it out"


def reasons(block: nn.Module, sites: Collection[LinearSite], chosen: Collection[str]) -> dict[str, str]:
    """Why each matrix of a block, or larger tensor, stays as it is.

    Args:
        block: The block.
        sites: All its linear weights.
        chosen: Names inside the block of those that are quantized.
    """
    of = {site.name: site.role or UNCHOSEN for site in sites}
    return {
        name: of.get(name, UNSEEN)
        for name, parameter in block.named_parameters()
        if parameter.ndim > 1 and name not in chosen
    }


def lines(left: Mapping[str, tuple[str, int]], total: int) -> list[str]:
    """A line for each kind of tensor that stays as it is.

    Args:
        left: Reason and number of weights of each, by full name.
        total: Weights of all blocks concerned.
    """
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, (reason, count) in left.items():
        kinds.setdefault((re.sub(r"\.\d+(?=\.)", ".*", name), reason), []).append(count)
    said = []
    for (pattern, reason), counts in kinds.items():
        share = f"{len(counts)} with {sum(counts):,} weights, {sum(counts) / total:.2%} of the blocks"
        way_in = "" if reason in (UNSEEN, UNCHOSEN) else "; a pattern in model.include that names it takes it in"
        said.append(f"not quantized: {pattern} ({share}): {reason}{way_in}")
    return said
