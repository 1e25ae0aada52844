"""Which matrices outside of the blocks are quantized, and to what."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.ends import find_ends
from lightning_gsq.training.selection import Selection
from lightning_gsq.weights.assignment import applied, fit_rows, names_it, scheme_of
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.vector_grid import VectorGrid

AUTO = "auto"
EIGHT_BITS = QuantScheme(8, 32)
"""What an embedding has by itself: lossless in practice, and what every program that quantizes embeddings can hold."""


def outer(option: str, value: QuantScheme | str | None, blocks: QuantScheme) -> QuantScheme | None:
    """What ``model.embedding`` or ``model.head`` says: settings, a preset's name, or "auto" for the embedding.

    Args:
        option: Which of the two.
        value: What it says.
        blocks: The scheme of the weights in the blocks.

    Raises:
        ConfigurationError: it makes no sense.
    """
    if option == "embedding" and value == AUTO:
        # Formats that have one dtype for all scales hold both then.
        return EIGHT_BITS if blocks.layout.dtype is None else QuantScheme(preset="q8_0")
    try:
        return None if value is None else scheme_of(value)
    except ConfigurationError as error:
        raise ConfigurationError(f"model.{option}: {error}") from error


@dataclass(frozen=True)
class OuterOptions:
    """What happens to the matrices outside of the blocks.

    Args:
        embedding: Grid and groups of the embedding, and of a head that is tied to it; None leaves it as it is.
        head: Grid and groups of a head that is a matrix of its own; None leaves it as it is.
        fallback: Give rows that a preset does not hold the one that llama.cpp takes for them.
        automatic: Nobody asked for the embedding's scheme: where the model has no use for it, it stays as it is.
        kept: The embedding was asked to stay at 16 bits: where widths are chosen for a size, it has no choice.
        selection: What patterns say, and what was chosen; those that name one of these matrices count for it.
    """

    embedding: QuantScheme | None = None
    head: QuantScheme | None = None
    fallback: bool = False
    automatic: bool = False
    kept: bool = False
    selection: Selection | None = None

    def __post_init__(self) -> None:
        for option, scheme in (("embedding", self.embedding), ("head", self.head)):
            if scheme is not None and scheme.mixed:
                raise ConfigurationError(
                    f"model.{option}: salient weights and budgets are for matrices in the blocks, got {scheme}; give "
                    "bits and group_size alone"
                )
            if scheme is not None and isinstance(scheme.grid, VectorGrid):
                raise ConfigurationError(
                    f"model.{option} is rounded weight by weight, and the weights of {scheme} are code vectors; take "
                    "levels, such as q4_0, q6_k or q8_0"
                )

    def left(self, network: PreTrainedModel) -> str | None:
        """Why an embedding with the automatic scheme stays at 16 bits; None if it does not, or has another scheme."""
        if not self.automatic or self.embedding is None:
            return None
        name, group = find_ends(network).embedding, self.embedding.group_size
        if name is None:
            return f"model.embedding auto: {type(network).__name__} has none that is one matrix; it stays at 16 bits"
        columns = network.get_parameter(name).shape[1]
        if columns % group:
            why = f"{name} has rows of {columns} weights, no whole groups of {group}"
            return f"model.embedding auto: {why}; kept at 16 bits"
        return None

    def stays(self, network: PreTrainedModel, name: str) -> bool:
        """Whether the settings leave a matrix outside of the blocks at 16 bits, whatever a size would choose for it."""
        return self._excluded(name) or (self.kept and name == find_ends(network).embedding)

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
            if option == "embedding" and self.left(network) is not None:
                scheme = None
            scheme = self._named(scheme, name)
            if scheme is None:
                continue
            if name is None:
                raise ConfigurationError(
                    f"model.{option}: {type(network).__name__} has no {option} that is one matrix; "
                    f"got {scheme}, use null"
                )
            rows, columns = network.get_parameter(name).shape
            fitting = fit_rows({name: scheme}, {name: columns}, self.fallback, f"model.{option}")[name]
            chosen[name] = (fitting, (rows, columns))
        return chosen

    def _excluded(self, name: str) -> bool:
        patterns = () if self.selection is None else self.selection.exclude
        return any(names_it(pattern, name, outside=True) for pattern in patterns)

    def _named(self, scheme: QuantScheme | None, name: str | None) -> QuantScheme | None:
        """The scheme of a matrix after what patterns and the choice of widths say of it."""
        selection = self.selection
        if selection is None or name is None:
            return scheme
        if self._excluded(name):
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
