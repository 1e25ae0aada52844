"""Which matrices of a model are quantized, and to what: in the blocks, and outside of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.ends import find_ends
from lightning_gsq.models.linear_weights import LinearSite, to_quantize
from lightning_gsq.weights.assignment import (
    SchemeOverride,
    applied,
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


@dataclass(frozen=True)
class OuterOptions:
    """What happens to the matrices outside of the blocks.

    Args:
        embedding: Grid and groups of the embedding, and of a head that is tied to it; None leaves it as it is.
        head: Grid and groups of a head that is a matrix of its own; None leaves it as it is.
        fallback: Give rows that a preset does not hold the one that llama.cpp takes for them.
        selection: What patterns say, and what was chosen; those that name one of these matrices count for it.
    """

    embedding: QuantScheme | None = None
    head: QuantScheme | None = None
    fallback: bool = False
    selection: Selection | None = None

    def __post_init__(self) -> None:
        for option, scheme in (("embedding", self.embedding), ("head", self.head)):
            if scheme is not None and scheme.mixed:
                raise ConfigurationError(
                    f"model.{option}: salient weights and budgets are for matrices in the blocks, got {scheme}; give "
                    "bits and group_size alone"
                )

    def expected(self, network: PreTrainedModel) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """Scheme and ``(V, D)`` of each matrix to quantize, by its parameter name.

        Raises:
            ConfigurationError: the model has no such matrix, the head is the embedding, or a preset does not hold rows
                of that many weights.
        """
        ends = find_ends(network)
        if self.head is not None and ends.tied:
            raise ConfigurationError(
                f"model.head: the head of {type(network).__name__} is tied to its embedding, whose codes it shares; "
                f"got {self.head}. Leave model.head out and give model.embedding, which is for both"
            )
        chosen = {}
        for option, scheme, name in (
            ("embedding", self.embedding, ends.embedding),
            ("head", self.head, None if ends.tied else ends.head),
        ):
            scheme = self._named(scheme, name)
            if scheme is None:
                continue
            if name is None:
                raise ConfigurationError(
                    f"model.{option}: {type(network).__name__} has no {option} that is one matrix; "
                    f"got {scheme}, use null"
                )
            rows, columns = network.get_parameter(name).shape
            fitting = fit_rows({name: scheme}, {name: columns}, self.fallback)[name]
            chosen[name] = (fitting, (rows, columns))
        return chosen

    def _named(self, scheme: QuantScheme | None, name: str | None) -> QuantScheme | None:
        """The scheme of a matrix after what patterns and the choice of widths say of it."""
        selection = self.selection
        if selection is None or name is None:
            return scheme
        if any(names_it(pattern, name, outside=True) for pattern in selection.exclude):
            return None
        if name in selection.chosen:
            return scheme_of(selection.chosen[name])
        for pattern, override in selection.overrides.items():
            if names_it(pattern, name, outside=True):
                scheme = applied(pattern, override, scheme or selection.scheme)
        if scheme is not None and scheme.mixed:
            raise ConfigurationError(
                f"model.overrides: {name} is outside of the blocks, whose matrices alone have salient weights and "
                f"budgets, got {scheme}; give a preset, or bits and group_size"
            )
        return scheme
