"""Text that a script has in memory, as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_gsq.data.documents import Document
from lightning_gsq.data.sources import TextSource

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.digests import data_digest


class Texts(TextSource):
    """Documents as a list: strings, or lists of chat messages.

    Args:
        texts: The documents.

    Raises:
        ConfigurationError: it is no list, or an empty one.
    """

    def __init__(self, texts: Sequence[Any]) -> None:
        if isinstance(texts, str | bytes) or not isinstance(texts, Sequence) or not texts:
            shown = "an empty list" if isinstance(texts, Sequence) and not texts else type(texts).__name__
            raise ConfigurationError(f"texts: expected a list of documents, got {shown}")
        self.texts = list(texts)

    def documents(self) -> Iterator[Document]:
        """See :meth:`TextSource.documents`."""
        yield from self.texts

    def identity(self) -> dict[str, Any]:
        """See :meth:`TextSource.identity`."""
        return {"Texts": data_digest(self.texts)}
