"""The few weights of a matrix that get more bits than the rest: how many, which, and how they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.grid import MAX_BITS
from lightning_gsq.weights.packing import WORD_BITS

MAX_SCALE_GROUPS = 256
"""Distinct scales of a matrix whose numbers fit a byte."""
NARROW = 8 * WORD_BITS
"""Matrices with fewer input features choose single columns, others whole words of 32."""


@dataclass(frozen=True)
class SalientPart:
    """The few weights of a matrix that get more bits than the rest (SAGE-PTQ, arXiv 2606.05429).

    Args:
        layout: "structured": whole input columns are salient, and positions cost next to nothing; "element": any
            weight may be, as published, and the positions of all of them are stored.
        bits: Bits of a salient weight, 2 to 8.
        ratio: Share of the weights that are salient; null searches it for each matrix (model.saliency).
        score: What makes a weight salient: "magnitude", its distance from the mean; "hessian", that times its input's
            second moment; "error", how much of the output's error its bits take away (structured only).
        group_size: Salient weights of a row that share one scale; -1 for one scale a row.
        scale_groups: Distinct scales of the other weights in one matrix. A number, or "graph" for the count that
            graph-guided grouping finds; null leaves every group of group_size weights a scale of its own in the
            structured layout and means "graph" in the element layout.
        trained: Train the salient weights together with the others; otherwise they stay at their warm start.

    Raises:
        ConfigurationError: a value out of range, or one that the layout does not know.
    """

    layout: Literal["structured", "element"] = "structured"
    bits: int = 4
    ratio: float | None = None
    score: Literal["magnitude", "hessian", "error"] = "magnitude"
    group_size: int = -1
    scale_groups: int | Literal["graph"] | None = None
    trained: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= MAX_BITS:
            raise ConfigurationError(f"salient.bits must be 2 to {MAX_BITS}, got {self.bits}")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ConfigurationError(f"salient.ratio must be a share of the weights, 0 to below 1, got {self.ratio}")
        if self.group_size != -1 and (self.group_size < 1 or self.layout == "element"):
            raise ConfigurationError(
                "salient.group_size must be a positive number of weights, or -1 for one scale a row, the only choice "
                f"with salient.layout element; got {self.group_size}"
            )
        if isinstance(self.scale_groups, int) and not 1 <= self.scale_groups <= MAX_SCALE_GROUPS:
            raise ConfigurationError(
                f"salient.scale_groups must be 1 to {MAX_SCALE_GROUPS}, graph or null, got {self.scale_groups}"
            )
        if self.layout == "element" and self.score == "error":
            raise ConfigurationError(
                "salient.score error compares whole columns: use it with salient.layout structured, or choose "
                "magnitude or hessian"
            )


def column_step(in_features: int) -> int:
    """Columns that are chosen together: 32, so that no row of packed codes ends in padding; 1 in a narrow matrix."""
    return WORD_BITS if in_features >= NARROW else 1


def column_count(ratio: float, in_features: int) -> int:
    """Salient columns for a ratio: whole steps, and at least one step is left to the others."""
    step = column_step(in_features)
    return min(round(ratio * in_features / step), (in_features - 1) // step) * step
