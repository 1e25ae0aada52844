"""Which share of the end-to-end phase's learning rates each width takes.

The finer a grid, the less rounding has left to be mended, and the shorter the way of its scales: with the steps of a
coarse one they overshoot (measured in docs/end_to_end.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_gsq.quantizers.trained_scales import SCALE_PARAMETERS
from lightning_gsq.training.student_block import StudentBlock
from lightning_gsq.training.student_outer import StudentOuter
from lightning_gsq.weights.scheme import QuantScheme

COARSE_BITS = 3
"""Width up to which scales take the whole learning rate."""


def step_share(scheme: QuantScheme) -> float:
    """Share of the learning rate that the scales of a weight take: halved by each bit above :data:`COARSE_BITS`."""
    return min(1.0, 2.0 ** (COARSE_BITS - scheme.storage_bits))


def scale_shares(parts: Iterable[StudentBlock | StudentOuter]) -> dict[nn.Parameter, float]:
    """That of every parameter that is a scale."""
    return {
        parameter: step_share(weight.scheme)
        for weight in _weights(parts)
        for name, parameter in weight.named_parameters()
        if name.rpartition(".")[2] in SCALE_PARAMETERS
    }


def mean_share(blocks: Iterable[StudentBlock]) -> float:
    """The mean over the quantized weights of some blocks, each matrix counted by its size: what norms take."""
    total, count = 0.0, 0
    for block in blocks:
        for site, weight in zip(block.sites, _weights([block]), strict=True):
            size = site.rows * site.in_features
            total, count = total + size * step_share(weight.scheme), count + size
    return total / count if count else 1.0


def _weights(parts: Iterable[StudentBlock | StudentOuter]) -> list[Any]:
    return [weight for part in parts for weight in part.weights]
