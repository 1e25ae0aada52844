"""The salient ratio of one matrix: more salient weights must pay for themselves.

Minimises ``error(ratio) + price * bits(ratio)`` by Brent's method on an interval (``scipy.optimize.minimize_scalar``),
as SAGE-PTQ's adaptive thresholding (arXiv 2606.05429). The interval's ends compete with what is found inside, because
the best ratio of many matrices is none at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scipy.optimize import minimize_scalar

Cost = Callable[[float], tuple[float, float]]
"""Relative error and true bits a weight at a salient ratio."""


@dataclass(frozen=True)
class Threshold:
    """The ratio found.

    Args:
        ratio: Share of salient weights.
        error: Relative squared error there.
        bits: True bits a weight there.
        evaluations: How many ratios were looked at.
    """

    ratio: float
    error: float
    bits: float
    evaluations: int


def adaptive_ratio(cost: Cost, price: float, low: float = 0.0, high: float = 0.5, tolerance: float = 1e-3) -> Threshold:
    """The ratio between ``low`` and ``high`` with the least ``error + price * bits``.

    Args:
        cost: Error and bits at a ratio.
        price: Relative error that one bit a weight is worth.
        low: Smallest ratio.
        high: Largest ratio.
        tolerance: Accuracy of the ratio.
    """
    seen: dict[float, tuple[float, float]] = {}

    def objective(ratio: float) -> float:
        if ratio not in seen:
            seen[ratio] = cost(ratio)
        error, bits = seen[ratio]
        return error + price * bits

    minimum = minimize_scalar(objective, bounds=(low, high), method="bounded", options={"xatol": tolerance})
    best = min((low, high, float(minimum.x)), key=objective)
    return Threshold(best, *seen[best], evaluations=len(seen))
