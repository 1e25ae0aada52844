"""Which share of the end-to-end phase's learning rates each width takes, and a model that begins close to its goal.

The finer a grid, the less rounding has left to be mended, and the shorter the way of its scales: with the steps of a
coarse one they overshoot. So they do where few matrices are quantized, whatever their grids (measured in
docs/end_to_end.md).
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
FAR = 0.18
"""Divergence from the full-precision model, in nats a token, from which on scales take the whole learning rate."""


def step_share(scheme: QuantScheme, divergence: float) -> float:
    """Share of the learning rate that the scales of a weight take.

    Args:
        scheme: Of the weight; each bit above :data:`COARSE_BITS` halves the share.
        divergence: Of the model at the start of the phase; below :data:`FAR` the share is at most in proportion.
    """
    return min(1.0, 2.0 ** (COARSE_BITS - scheme.storage_bits), divergence / FAR)


def scale_shares(parts: Iterable[StudentBlock | StudentOuter], divergence: float) -> dict[nn.Parameter, float]:
    """That of every parameter that is a scale."""
    return {
        parameter: step_share(weight.scheme, divergence)
        for weight in _weights(parts)
        for name, parameter in weight.named_parameters()
        if name.rpartition(".")[2] in SCALE_PARAMETERS
    }


def mean_share(blocks: Iterable[StudentBlock], divergence: float) -> float:
    """The mean over the quantized weights of some blocks, each matrix counted by its size: what norms take."""
    total, count = 0.0, 0
    for block in blocks:
        for site, weight in zip(block.sites, _weights([block]), strict=True):
            size = site.rows * site.in_features
            total, count = total + size * step_share(weight.scheme, divergence), count + size
    return total / count if count else 1.0


def _weights(parts: Iterable[StudentBlock | StudentOuter]) -> list[Any]:
    return [weight for part in parts for weight in part.weights]
