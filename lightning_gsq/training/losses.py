"""Losses as they are added up: how many positions at once, and what happens to a number that is none."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MeanMetric

LOSS_POSITIONS = 128
"""Positions whose fp32 log-probabilities are held at once: a vocabulary of 128,000 takes half a megabyte each."""


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite."""


def loss_mean() -> MeanMetric:
    """A mean of losses over all batches and processes. It drops no NaN: what adds one to it has to say where it was."""
    return MeanMetric(nan_strategy="error")


def refuse_non_finite(value: float | Tensor, what: str, advice: str) -> None:
    """Raises where a loss is NaN or infinite.

    Args:
        value: The loss, a scalar.
        what: Of what it is, with block, step or window.
        advice: What to do, a sentence without its end.

    Raises:
        NonFiniteLossError: it is.
    """
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not -float("inf") < number < float("inf"):
        raise NonFiniteLossError(f"{what} is {number}; {advice}")
