"""Several text sources as one, in turn or at random by weights."""

from __future__ import annotations

import logging
import math
import random
from typing import Any

from lightning_gsq.data.documents import Document
from lightning_gsq.data.sources import END, DocumentReader, Position, TextSource, check_sources
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.seeding import seed_of

_log = logging.getLogger(__name__)


class Mixture(TextSource):
    """Documents of several sources, until all are used up.

    Args:
        sources: The sources.
        weights: How often each source gives the next document, relative to the others, drawn at random; null for one
            document from each in turn. They count documents, not tokens.
        seed: Seed of the draws.
    """

    def __init__(self, sources: list[TextSource], weights: list[float] | None = None, seed: int = 0) -> None:
        if not sources:
            raise ConfigurationError("sources: a mixture needs at least one source")
        check_sources("sources", *sources)
        if weights is not None:
            if len(weights) != len(sources):
                raise ConfigurationError(f"weights: {len(sources)} sources need as many weights, got {len(weights)}")
            if not all(math.isfinite(weight) and weight > 0 for weight in weights):
                raise ConfigurationError(f"weights: each must be a positive number, got {weights}")
        self.sources, self.weights, self.seed = sources, weights, seed
        self.needs_model = any(source.needs_model for source in sources)

    def check(self) -> None:
        """Checks every source."""
        for source in self.sources:
            source.check()

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hands the model to the sources that need it."""
        for source in self.sources:
            if source.needs_model:
                source.attach(model, tokenizer)

    def identity(self) -> dict[str, Any] | None:
        """See :meth:`TextSource.identity`."""
        parts = [source.identity() for source in self.sources]
        if None in parts:
            return None
        return {"Mixture": parts, "weights": self.weights, "seed": self.seed if self.weights else None}

    def documents(self) -> DocumentReader:
        """See :meth:`TextSource.documents`."""
        return self.reader()

    def reader(self, position: Position | None = None) -> DocumentReader:
        """See :meth:`TextSource.reader`."""
        return _MixtureReader(self, position)


class _MixtureReader(DocumentReader):
    """Position: how many documents were drawn, which source gave the last, and where each source stands (None: ended).

    The draw of a document depends on the seed and its number alone, so that a reader goes on as if never interrupted.
    """

    def __init__(self, mixture: Mixture, position: Position | None) -> None:
        self._mixture = mixture
        count = len(mixture.sources)
        position = position or {"drawn": 0, "last": count - 1, "open": [True] * count, "sources": [None] * count}
        self._drawn, self._last = int(position["drawn"]), int(position["last"])
        self._place = ""
        self._readers = [
            source.reader(own) if is_open else None
            for source, own, is_open in zip(mixture.sources, position["sources"], position["open"], strict=True)
        ]

    def __next__(self) -> Document:
        while any(self._readers):
            index = self._choose()
            reader = self._readers[index]
            assert reader is not None
            document = next(reader, END)
            self._last, self._drawn = index, self._drawn + 1
            if document is not END:
                self._place = reader.place
                return document
            self._end(index)
        raise StopIteration

    @property
    def position(self) -> Position:
        return {
            "drawn": self._drawn,
            "last": self._last,
            "open": [reader is not None for reader in self._readers],
            "sources": [None if reader is None else reader.position for reader in self._readers],
        }

    @property
    def place(self) -> str:
        return self._place

    def _choose(self) -> int:
        count, weights = len(self._readers), self._mixture.weights
        if weights is None:
            turns = ((self._last + 1 + step) % count for step in range(count))
            return next(index for index in turns if self._readers[index] is not None)
        still_open = [index for index in range(count) if self._readers[index] is not None]
        draw = random.Random(seed_of("mixture", self._mixture.seed, self._drawn))
        return draw.choices(still_open, [weights[index] for index in still_open])[0]

    def _end(self, index: int) -> None:
        self._readers[index] = None
        if self._mixture.weights is not None and any(self._readers):
            _log.warning(
                "source %d of the mixture is used up after %d documents of all; the others go on without it",
                index,
                self._drawn - 1,
            )
