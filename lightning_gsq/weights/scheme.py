"""What a quantized weight looks like: its level grid, its groups, and which weights get which.

Shape legend, used in the whole package: ``O`` output features, ``I`` input features, ``G`` scale groups per row
(``G = ceil(I / group_size)``), ``L`` candidate levels, ``E`` experts, ``B`` sequences, ``T`` tokens, ``D`` model
width, ``N`` calibration sequences. A weight is ``w_OI``, its codes ``q_OI``, its scales ``s_OG``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_gsq.errors import ConfigurationError

Bits = int | Literal["ternary"]
MIN_BITS, MAX_BITS = 1, 8
MAX_SCALE_GROUPS = 256
"""Distinct scales of a matrix whose numbers fit a byte."""


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

    @property
    def scheme(self) -> QuantScheme:
        """Grid and groups of the salient weights."""
        return QuantScheme(self.bits, self.group_size)


@dataclass(frozen=True)
class QuantScheme:
    """Symmetric group-wise scalar quantization: ``w = scale of the group * level``, without zero points.

    | bits      | levels                       | stored as |
    |-----------|------------------------------|-----------|
    | 1         | -1, +1                       | 1 bit     |
    | "ternary" | -1, 0, +1                    | 2 bits    |
    | b = 2...8 | -2^(b-1) ... 2^(b-1) - 1     | b bits    |

    Args:
        bits: Bits a weight, 1 to 8, or "ternary".
        group_size: Consecutive input features that share one scale; -1 for one scale a row. The last group of a
            row may be shorter.
        salient: A part of each matrix that gets more bits; bits and group_size are then those of the other weights.
        budget: True bits a weight (codes, scales and positions) that the blocks may cost. Salient ratio, salient bits
            and group size are then chosen for each matrix, and those given here are not used.

    Raises:
        ConfigurationError: a value out of range, or a combination that does not exist.
    """

    bits: Bits = 2
    group_size: int = 64
    salient: SalientPart | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        valid = self.bits == "ternary" or (isinstance(self.bits, int) and MIN_BITS <= self.bits <= MAX_BITS)
        if not valid:
            raise ConfigurationError(f"bits must be {MIN_BITS} to {MAX_BITS} or 'ternary', got {self.bits!r}")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigurationError(
                f"group_size must be a positive number of weights, or -1 for one scale a row, got {self.group_size}"
            )
        if self.salient is not None and self.salient.layout == "element" and self.bits != 1:
            raise ConfigurationError(
                f"bits must be 1 with salient.layout element, got {self.bits!r}; salient.layout structured takes any"
            )
        if self.budget is not None:
            if self.salient is not None and self.salient.layout == "element":
                raise ConfigurationError("budget needs salient.layout structured, got element")
            if not self.storage_bits < self.budget <= MAX_BITS:
                raise ConfigurationError(
                    f"budget must be above the {self.storage_bits} bits that a code takes and at most {MAX_BITS}, got "
                    f"{self.budget}; fewer bits make room for less"
                )

    @property
    def mixed(self) -> bool:
        """Whether some weights of a matrix may be salient."""
        return self.salient is not None or self.budget is not None

    @property
    def settled(self) -> bool:
        """Whether nothing is left to choose for each matrix."""
        if self.budget is not None:
            return False
        return self.salient is None or (
            self.salient.ratio is not None
            and self.salient.scale_groups != "graph"
            and not (self.salient.layout == "element" and self.salient.scale_groups is None)
        )

    @property
    def plain(self) -> QuantScheme:
        """Grid and groups alone."""
        return QuantScheme(self.bits, self.group_size)

    def admits(self, chosen: QuantScheme) -> bool:
        """Whether ``chosen``, the scheme of a finished matrix, is one that this scheme could have led to."""
        if not self.mixed:
            return chosen == self
        if chosen.bits != self.bits or chosen.budget is not None:
            return False
        if self.budget is not None:
            return chosen.salient is None or chosen.salient.layout == "structured"
        assert self.salient is not None
        if chosen.group_size != self.group_size or chosen.salient is None:
            return False
        # The ratio was rounded to whole columns or weights.
        own = dataclasses.replace(self.salient, ratio=chosen.salient.ratio)
        if not isinstance(own.scale_groups, int):
            own = dataclasses.replace(own, scale_groups=chosen.salient.scale_groups)
        return own == chosen.salient

    @property
    def low(self) -> int:
        """The smallest level."""
        return -1 if self.bits in (1, "ternary") else -(2 ** (int(self.bits) - 1))

    @property
    def high(self) -> int:
        """The largest level."""
        return 1 if self.bits in (1, "ternary") else 2 ** (int(self.bits) - 1) - 1

    @property
    def levels(self) -> tuple[int, ...]:
        """All levels in rising order."""
        return (-1, 1) if self.bits == 1 else tuple(range(self.low, self.high + 1))

    @property
    def storage_bits(self) -> int:
        """Bits that one packed code takes."""
        return 2 if self.bits == "ternary" else int(self.bits)

    def group_length(self, in_features: int) -> int:
        """Weights in one full group of a row with ``in_features`` weights."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Scale groups per row, ``G``."""
        return math.ceil(in_features / self.group_length(in_features))

    def __str__(self) -> str:
        name = "ternary" if self.bits == "ternary" else f"{self.bits} bit"
        if self.budget is not None:
            return f"{name} and salient columns within {self.budget:g} true bits"
        if self.salient is not None and self.salient.layout == "element":
            return f"{name}, any weights salient at {self.salient.bits} bits"
        groups = "one scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{name}, {groups}" + (f", salient columns at {self.salient.bits} bits" if self.salient else "")


@dataclass(frozen=True)
class SchemeOverride:
    """Settings that replace the scheme's own for the weights that a pattern names; None keeps the scheme's.

    Args:
        bits: Bits a weight, 1 to 8, or "ternary".
        group_size: Weights that share one scale; -1 for one scale a row.
        salient: The salient part.
    """

    bits: Bits | None = None
    group_size: int | None = None
    salient: SalientPart | None = None

    def apply(self, scheme: QuantScheme) -> QuantScheme:
        """The scheme with this override's settings in place."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changes = {name: value for name, value in own.items() if value is not None}
        return dataclasses.replace(scheme, **changes)


def assign_schemes(
    names: Iterable[str],
    scheme: QuantScheme,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, SchemeOverride] | None = None,
) -> dict[str, QuantScheme]:
    """Chooses the weights to quantize and the scheme of each.

    A pattern is a shell pattern (``*``, ``?``, ``[...]``) matched against the full parameter name, such as
    ``model.layers.3.mlp.down_proj.weight``, or against a module name without the ending ``.weight``. Where several
    overrides match a name, they apply in their order, so that the last one wins.

    Raises:
        ConfigurationError: a pattern matches no weight, or nothing is left to quantize.
    """
    names = list(names)
    include, exclude, overrides = tuple(include), tuple(exclude), dict(overrides or {})
    for option, patterns in (("include", include), ("exclude", exclude), ("overrides", overrides)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                examples = ", ".join(names[:3])
                raise ConfigurationError(
                    f"{option}: the pattern {pattern!r} matches none of the {len(names)} linear weights; "
                    f"their names look like {examples}"
                )
    chosen = {}
    for name in names:
        if not any(_matches(name, p) for p in include) or any(_matches(name, p) for p in exclude):
            continue
        own = scheme
        for pattern, override in overrides.items():
            if _matches(name, pattern):
                own = override.apply(own)
        chosen[name] = own
    if not chosen:
        raise ConfigurationError(f"include={list(include)} and exclude={list(exclude)} leave no weight to quantize")
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)
