"""Noise taken out of what matrices are predicted to be worth.

Each prediction is a mean of ``N`` squares, so that it is off by some ``sqrt(2 / N)`` of itself, 18 % at 64 samples, and
a choice among many such numbers takes what is too low by chance. What they have in common is known better: matrices of
one kind (every ``down_proj``) differ by a factor of their own, choices by another,

    log worth(matrix, choice)  ~  factor of the matrix + factor of the choice for that kind

and what is left of a choice is taken for noise as far as it is no larger than noise is (empirical Bayes: of a residual
with variance ``r^2``, a share ``1 - 2 / (N r^2)`` stays).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_gsq.widths.groups import group_name
from lightning_gsq.widths.worth import Worth


def smoothed(worth: Worth, prefix: str, samples: int) -> Worth:
    """The worth of every choice without its noise.

    Args:
        worth: Predictions.
        prefix: Name of the list of blocks.
        samples: How many squares each is the mean of.

    Returns:
        By the same names. Matrices whose choices are not all worth something, or that are alone in their kind, stay.
    """
    kinds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, costs in worth.items():
        if all(cost > 0 for cost in costs.values()):
            kinds.setdefault((_kind(name, prefix), tuple(costs)), []).append(name)
    result = {name: dict(costs) for name, costs in worth.items()}
    for (_, choices), names in kinds.items():
        for name, row in zip(names, _fit([list(worth[name].values()) for name in names], samples), strict=True):
            result[name] = dict(zip(choices, row, strict=True))
    return result


def _fit(costs: Sequence[Sequence[float]], samples: int) -> list[list[float]]:
    logs = np.log(np.array(costs))
    rows, columns = logs.shape
    fitted = logs.mean(1, keepdims=True) + logs.mean(0, keepdims=True) - logs.mean()
    if rows == 1 or columns == 1:
        return np.exp(logs).tolist()
    left = logs - fitted
    # Two factors were fitted, which took their part of the variance.
    variance_C = (left**2).sum(0) / (rows - 1) * columns / (columns - 1)
    stays_C = np.clip(1 - 2 / samples / np.maximum(variance_C, 1e-30), 0, 1)
    return np.exp(fitted + stays_C * left).tolist()


def _kind(name: str, prefix: str) -> str:
    """The name of a matrix without the number of its block."""
    group = group_name(name, prefix)
    return group.removeprefix(f"{prefix}.").partition(".")[2] if group.startswith(f"{prefix}.") else name
