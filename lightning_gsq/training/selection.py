"""Which matrices of a model are quantized, and to what: in the blocks, and outside of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.linear_weights import LinearSite, to_quantize
from lightning_gsq.weights.assignment import (
    SchemeOverride,
    assign_schemes,
    fit_rows,
    names_it,
    scheme_of,
)
from lightning_gsq.weights.scheme import QuantScheme


@dataclass(frozen=True)
class Selection:
    """Which weights are quantized, and to what.

    Args:
        scheme: Grid and groups of every one.
        include: Patterns of the weights to quantize.
        exclude: Patterns of weights to leave as they are.
        overrides: Other schemes for the weights that a pattern names.
        blocks: Range of blocks, such as ``0:4``; None for all.
        fallback: Give rows that a preset does not hold the one that llama.cpp takes for them.
        chosen: Names of presets by full parameter name, where a size is given and the choice is made.
        name: What all of this is called; empty for the scheme's own name.
    """

    scheme: QuantScheme
    include: Sequence[str]
    exclude: Sequence[str]
    overrides: Mapping[str, SchemeOverride]
    blocks: str | None
    fallback: bool = False
    chosen: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.scheme)

    def schemes(self, sites: Mapping[str, LinearSite], outside: Collection[str] = ()) -> dict[str, QuantScheme]:
        """The weights to quantize, of these, and the scheme of each.

        Args:
            sites: Linear weights by their full names; one with a role is taken only if a pattern names it.
            outside: Names of the embedding and the head, which a pattern may name as well.

        Raises:
            ConfigurationError: a pattern matches no weight, nothing is left, or a scheme does not hold a weight's rows.
        """
        names = to_quantize(sites, self.include)
        in_features = {name: sites[name].in_features for name in names}
        schemes = assign_schemes(in_features, self.scheme, self.include, self.exclude, self.overrides, outside)
        schemes |= {name: scheme_of(self.chosen[name]) for name in schemes if name in self.chosen}
        return fit_rows(schemes, in_features, self.fallback)

    def pins(self, name: str, outside: bool = False) -> bool:
        """Whether an override says what a weight takes; one outside of the blocks has to be named."""
        return any(names_it(pattern, name, outside) for pattern in self.overrides)

    def indices(self, count: int) -> range:
        """The numbers of the blocks to quantize, of ``count``.

        Raises:
            ConfigurationError: ``blocks`` is no range, or an empty one.
        """
        if self.blocks is None:
            return range(count)
        match = re.fullmatch(r"(\d*):(\d*)", self.blocks)
        if not match:
            raise ConfigurationError(f"model.blocks must be a range such as 0:4, got {self.blocks!r}")
        start, stop = int(match[1] or 0), int(match[2] or count)
        if not 0 <= start < stop <= count:
            raise ConfigurationError(f"model.blocks: {self.blocks} is not a range within the model's {count} blocks")
        return range(start, stop)
