"""Reading on after failures that pass."""

from __future__ import annotations

import logging
import time

from lightning_gsq.data.documents import Document, accept
from lightning_gsq.data.sources import DocumentReader, Position, TextSource, check_kind

from lightning_gsq.errors import ConfigurationError

LONGEST_PAUSE = 60.0
NETWORK_CLIENTS = {"aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib"}
"""Packages whose errors say that a connection failed; a digit may end their names."""

_log = logging.getLogger(__name__)


class SourceFailedError(ConfigurationError):
    """A source that failed at every attempt, and may work another time: reading can go on where it stopped."""


class RetryingReader(DocumentReader):
    """Reads a source; after a passing failure it waits, and goes on at the position where it stopped.

    Args:
        source: What to read.
        position: Where to begin; None for the beginning.
        retries: Attempts after the first one at the same document.
        pause: Seconds before the first of them; doubled for each further one, up to a minute.

    Raises:
        SourceFailedError: from ``next``, when every attempt failed.
        ConfigurationError: from ``next``, when the failure is none that passes, or a document is none.
    """

    def __init__(
        self, source: TextSource, position: Position | None = None, retries: int = 5, pause: float = 1.0
    ) -> None:
        self._source, self._retries, self._pause = source, retries, pause
        self._position = position
        self._reader: DocumentReader | None = None

    def __next__(self) -> Document:
        name = type(self._source).__name__
        while True:
            value = self._attempt()
            # Readers of one's own come this way alone.
            check_kind(value, f"{name}.reader() must give", f" ({self.place})")
            document = accept(value, "data.source", self.place)
            if document is not None:
                return document

    def _attempt(self) -> Document:
        failures = 0
        while True:
            try:
                if self._reader is None:
                    self._reader = self._source.reader(self._position)
                return next(self._reader)
            except (FileNotFoundError, PermissionError) as error:
                raise ConfigurationError(f"data.source: cannot read on: {error}") from error
            except Exception as error:
                if isinstance(error, StopIteration) or not passes(error):
                    raise
                if failures == self._retries:
                    raise SourceFailedError(
                        f"failed {failures + 1} times in a row at the same place, the last time with "
                        f"{type(error).__name__}: {error}"
                    ) from error
                if self._reader is not None:
                    self._position, self._reader = self._reader.position, None
                wait = min(self._pause * 2.0 ** min(failures, 60), LONGEST_PAUSE)
                failures += 1
                _log.warning(
                    "reading the text failed (%s: %s); attempt %d of %d in %.0f s",
                    type(error).__name__,
                    error,
                    failures,
                    self._retries,
                    wait,
                )
                time.sleep(wait)

    @property
    def position(self) -> Position | None:  # type: ignore[override]
        """See :class:`DocumentReader`; None before anything was read."""
        return self._position if self._reader is None else self._reader.position

    @property
    def place(self) -> str:
        """See :class:`DocumentReader`; never empty."""
        place = "" if self._reader is None else self._reader.place
        return place or f"a document of {type(self._source).__name__}"


def passes(error: Exception) -> bool:
    """Whether a later attempt may not meet this error: those of networks and file systems.

    The clients that datasets are read through (whichever are installed) have errors of their own beside ``OSError``.
    """
    roots = {kind.__module__.partition(".")[0].rstrip("0123456789") for kind in type(error).__mro__}
    return isinstance(error, (OSError, EOFError)) or bool(roots & NETWORK_CLIENTS)
