"""What a quantized weight looks like: its level grid, its groups, and how much is left to choose.

Shape legend, used in the whole package: ``O`` output features, ``I`` input features, ``G`` scale groups per row
(``G = ceil(I / group_size)``), ``L`` candidate levels, ``E`` experts, ``B`` sequences, ``T`` tokens, ``D`` model
width, ``N`` calibration sequences. A weight is ``w_OI``, its codes ``q_OI``, its scales ``s_OG``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.grid import MAX_BITS, Bits, Grid, grid_of
from lightning_gsq.weights.layout import FLAT, Part, ScaleLayout
from lightning_gsq.weights.presets import plain_preset, preset_named
from lightning_gsq.weights.salient_part import SalientPart


@dataclass(frozen=True)
class QuantScheme:
    """Group-wise scalar quantization: ``w = scale of the group * level``, plus an offset where the layout has one.

    | bits      | levels                       | stored as |
    |-----------|------------------------------|-----------|
    | 1         | -1, +1                       | 1 bit     |
    | "ternary" | -1, 0, +1                    | 2 bits    |
    | b = 2...8 | -2^(b-1) ... 2^(b-1) - 1     | b bits    |

    A preset (:mod:`lightning_gsq.weights.presets`) fixes grid, groups and how scales are stored; without one, they are
    the table's, with one floating-point scale a group.

    Args:
        bits: Bits a weight, 1 to 8, or "ternary".
        group_size: Consecutive input features that share one scale; -1 for one scale a row. The last group of a
            row may be shorter.
        salient: A part of each matrix that gets more bits; bits and group_size are then those of the other weights.
        budget: True bits a weight (codes, scales and positions) that the blocks may cost. Salient ratio, salient bits
            and group size are then chosen for each matrix, and those given here are not used.
        preset: Name of a scheme, such as q4_k, iq4_nl, mlx4g64 or w3g64; bits and group_size are then its own.

    Raises:
        ConfigurationError: a value out of range, or a combination that does not exist.
    """

    bits: Bits = 3
    group_size: int = 64
    salient: SalientPart | None = None
    budget: float | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.preset is not None:
            self._take_preset(self.preset.lower())
        grid_of(self.bits)
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

    def _take_preset(self, name: str) -> None:
        """Fills bits and group size; a name that says no more than these leaves no trace."""
        plain = plain_preset(name)
        preset = None if plain else preset_named(name)
        bits, group_size = plain[:2] if plain else (preset.bits, preset.group_size)  # type: ignore[union-attr]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for option, wanted in (("bits", bits), ("group_size", group_size)):
            value = getattr(self, option)
            if value not in (wanted, defaults[option]):
                raise ConfigurationError(f"{option} {value} does not go with the preset {name}, whose own is {wanted}")
        if plain is not None and plain.salient is not None:
            if self.salient not in (None, plain.salient) or self.budget is not None:
                raise ConfigurationError(
                    f"the preset {name} has salient columns of its own: leave out salient and budget"
                )
            object.__setattr__(self, "salient", plain.salient)
        if preset is not None and (self.salient is not None or self.budget is not None):
            raise ConfigurationError(
                f"the preset {name} has no salient weights and no budget: leave them out, or give bits and group_size "
                "in place of the preset"
            )
        settings = {"bits": bits, "group_size": group_size, "preset": None if preset is None else preset.name}
        for option, setting in settings.items():
            object.__setattr__(self, option, setting)

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
        part = dataclasses.replace(self.salient, ratio=chosen.salient.ratio)
        if not isinstance(part.scale_groups, int):
            part = dataclasses.replace(part, scale_groups=chosen.salient.scale_groups)
        return part == chosen.salient

    @property
    def grid(self) -> Grid:
        """The levels of one weight."""
        return grid_of(self.bits) if self.preset is None else preset_named(self.preset).grid

    @property
    def layout(self) -> ScaleLayout:
        """How its scales are stored."""
        return FLAT if self.preset is None else preset_named(self.preset).layout

    @property
    def plain_symmetric(self) -> bool:
        """Whether it is a grid of the table above with a floating-point scale a group: what most formats know."""
        return self.preset is None or (self.layout.plain and self.grid == grid_of(self.bits))

    @property
    def low(self) -> int:
        """The smallest level."""
        return self.grid.low

    @property
    def high(self) -> int:
        """The largest level."""
        return self.grid.high

    @property
    def storage_bits(self) -> int:
        """Bits that one packed code takes."""
        return self.grid.storage_bits

    @property
    def salient_scheme(self) -> QuantScheme:
        """Grid and groups of the salient weights."""
        assert self.salient is not None
        return QuantScheme(self.salient.bits, self.salient.group_size)

    def parts(self, in_features: int) -> dict[str, Part]:
        """The tensors that the scales of rows with ``in_features`` weights are stored as, by name."""
        return self.layout.parts(in_features, self.group_length(in_features))

    def group_length(self, in_features: int) -> int:
        """Weights in one full group of a row with ``in_features`` weights."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Scale groups per row, ``G``."""
        return math.ceil(in_features / self.group_length(in_features))

    def __str__(self) -> str:
        if self.preset is not None:
            return self.preset
        name = "ternary" if self.bits == "ternary" else f"{self.bits} bit"
        if self.budget is not None:
            return f"{name} and salient columns within {self.budget:g} true bits"
        if self.salient is not None and self.salient.layout == "element":
            return f"{name}, any weights salient at {self.salient.bits} bits"
        groups = "one scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{name}, {groups}" + (f", salient columns at {self.salient.bits} bits" if self.salient else "")
