"""How far a figure measured on some windows of text may be from that of all such text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_gsq.system.processes import Ranks


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of some windows of text.

    Args:
        value: exp of the mean loss of a token, in nats.
        error: Its standard error, from how the mean losses of windows differ: tokens of a window depend on each other.
            None for a single window. Two models on the same windows differ by less than it.
    """

    value: float
    error: float | None

    def __str__(self) -> str:
        return with_error(self.value, self.error, 3)


def with_error(value: float, error: float | None, digits: int) -> str:
    """A figure and its standard error, where it has one."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def standard_error(means: Sequence[float], ranks: Ranks, device: torch.device) -> float | None:
    """Standard error of the mean of all processes' means; None for less than two of them.

    Args:
        means: This process's.
        ranks: This process among those that share them.
        device: Where processes add up.
    """
    sums = [float(len(means)), math.fsum(means), math.fsum(mean**2 for mean in means)]
    count, total, squares = ranks.sum(torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
    if count < 2:
        return None
    return math.sqrt(max(0.0, squares - total**2 / count) / (count - 1) / count)
