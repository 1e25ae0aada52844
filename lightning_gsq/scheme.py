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

    Raises:
        ConfigurationError: bits or group_size out of range.
    """

    bits: Bits = 2
    group_size: int = 64

    def __post_init__(self) -> None:
        valid = self.bits == "ternary" or (isinstance(self.bits, int) and MIN_BITS <= self.bits <= MAX_BITS)
        if not valid:
            raise ConfigurationError(f"bits must be {MIN_BITS} to {MAX_BITS} or 'ternary', got {self.bits!r}")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigurationError(
                f"group_size must be a positive number of weights, or -1 for one scale a row, got {self.group_size}"
            )

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
        return f"{name}, " + ("one scale a row" if self.group_size == -1 else f"groups of {self.group_size}")


@dataclass(frozen=True)
class SchemeOverride:
    """Settings that replace the scheme's own for the weights that a pattern names; None keeps the scheme's.

    Args:
        bits: Bits a weight, 1 to 8, or "ternary".
        group_size: Weights that share one scale; -1 for one scale a row.
    """

    bits: Bits | None = None
    group_size: int | None = None

    def apply(self, scheme: QuantScheme) -> QuantScheme:
        """The scheme with this override's settings in place."""
        changes = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
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
