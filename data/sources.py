"""Where calibration text comes from. Each source yields documents, and can go on in the middle of them.

A *position* is plain data (what JSON can hold) that says which document comes next; ``source.reader(position)`` goes on
there. A source whose documents are cheap to produce again only counts them; one that reads over a network or many large
files overrides :meth:`TextSource.reader`.
"""

from __future__ import annotations

import functools
import inspect
import platform
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from importlib import import_module
from itertools import islice
from pathlib import PurePath
from typing import Any, Final, TypeVar, cast

from lightning_gsq.data.documents import Document, accept
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError

Method = TypeVar("Method", bound=Callable[..., Any])
Position = dict[str, Any]
"""Where a reader stands, as plain data."""


class _End(Enum):
    END = 0


END: Final = _End.END
"""The end of a stream, as the default of ``next``: no value that a source can yield stands for it."""


class DocumentReader(Iterator[Document]):
    """Documents from a position on.

    ``position`` is that of the first document not handed out yet, also after ``next`` has raised an error: a new reader
    from there goes on without a gap.
    """

    @property
    @abstractmethod
    def position(self) -> Position:
        """Where this reader stands."""

    @property
    def place(self) -> str:
        """Where the last document stands, for messages: a line and its file; empty where that cannot be said."""
        return ""


class TextSource(ABC):
    """A stream of documents."""

    needs_model: bool = False
    """Whether :meth:`documents` needs the model itself, loaded: :meth:`attach` is called before. Such text belongs to
    one run, not to several."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yields documents: plain text, or chat messages where the source holds conversations.

        A None is passed over.

        Raises:
            ConfigurationError: the source is missing, empty or unreadable.
        """

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hands over the loaded model, where :attr:`needs_model` is true."""
        raise ConfigurationError(
            f"{type(self).__name__}: needs_model is true, and there is no attach(model, tokenizer) to take the model"
        )

    def reader(self, position: Position | None = None) -> DocumentReader:
        """The documents from a position on; None for the beginning."""
        return CountingReader(self._placed(), position)

    @property
    def label(self) -> str:
        """What the text is, in a few words, without the folders of this machine."""
        path = getattr(self, "path", None)
        return f"{type(self).__name__} {PurePath(path).name}" if isinstance(path, str) else type(self).__name__

    def identity(self) -> dict[str, Any] | None:
        """What the text depends on, as plain data: equal identities mean equal text. None if that cannot be said."""
        return None

    def check(self) -> None:
        """Verifies, before any long work, that the source can be read: asks it for its first document."""
        if next(self.reader(), END) is END:
            raise ConfigurationError(f"{type(self).__name__}: it yields no document")

    def _placed(self) -> Iterator[tuple[Document | None, str]]:
        name = type(self).__name__
        documents: Any = self.documents()
        if not isinstance(documents, Iterable) or isinstance(documents, (str, bytes, dict)):
            raise ConfigurationError(
                f"{name}.documents() must yield str or list of messages, it returned {type(documents).__name__}"
            )
        for number, document in enumerate(documents, start=1):
            check_kind(document, f"{name}.documents() must yield", f" as document {number}")
            place = f"document {number} of {name}"
            yield accept(document, "data.source", place), place


def check_kind(document: Any, must: str, where: str = "") -> None:
    """Refuses what a source of one's own hands out if it is neither text nor a list nor None.

    Raises:
        ConfigurationError: it is something else.
    """
    if document is not None and not isinstance(document, (str, list)):
        raise ConfigurationError(f"{must} str or list of messages, got {type(document).__name__}{where}")


def names_option(option: str) -> Callable[[Method], Method]:
    """Puts the option in front of what a source says of its own arguments, in methods of an object with a ``source``.

    A source does not know which option it was given to: its ``path: ...`` becomes ``data.source.path: ...``.

    Args:
        option: Such as ``data.source``.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def named(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except ConfigurationError as error:
                message, group = str(error), option.partition(".")[0]
                if not message.startswith(f"{group}."):
                    own = message.partition(": ")[0] in inspect.signature(type(self.source)).parameters
                    error.args = (f"{option}{'.' if own else ': '}{message}",)
                raise

        return cast("Method", named)

    return decorate


def check_sources(option: str, *sources: Any) -> None:
    """Refuses what is no text source.

    Raises:
        ConfigurationError: one of them is something else.
    """
    for source in sources:
        if not isinstance(source, TextSource):
            raise ConfigurationError(
                f"{option}: expected a TextSource, such as TextFile('text.txt'), got {type(source).__name__}"
            )


class CountingReader(DocumentReader):
    """Counts documents, those that are None included; goes on by passing over those already read.

    Args:
        placed: All documents of a source, each with its place.
        position: Where to begin.
    """

    def __init__(self, placed: Iterator[tuple[Document | None, str]], position: Position | None) -> None:
        self._placed, self._place = placed, ""
        self._count = int(position["documents"]) if position else 0
        deque(islice(placed, self._count), maxlen=0)

    def __next__(self) -> Document:
        while True:
            document, place = next(self._placed)
            self._count += 1
            if document is not None:
                self._place = place
                return document

    @property
    def position(self) -> Position:
        """See :class:`DocumentReader`."""
        return {"documents": self._count}

    @property
    def place(self) -> str:
        """See :class:`DocumentReader`."""
        return self._place


class PythonDocumentation(TextSource):
    """The reference texts of Python's own standard library (``pydoc_data.topics``): always there, no network.

    Args:
        part: "calibration" for nine topics of ten, "evaluation" for the others, or "all".
    """

    def __init__(self, part: str = "calibration") -> None:
        if part not in {"calibration", "evaluation", "all"}:
            raise ConfigurationError(f"part must be 'calibration', 'evaluation' or 'all', got {part!r}")
        self.part = part

    @property
    def label(self) -> str:
        """See :attr:`TextSource.label`."""
        return f"PythonDocumentation ({self.part})"

    def identity(self) -> dict[str, Any]:
        """See :meth:`TextSource.identity`."""
        return {"PythonDocumentation": self.part, "python": platform.python_version()}

    def documents(self) -> Iterator[str]:
        """See :meth:`TextSource.documents`."""
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        seen: set[str] = set()
        for number, name in enumerate(sorted(topics)):
            if self.part != "all" and (number % 10 == 2) != (self.part == "evaluation"):
                continue
            # Some topics hold whole paragraphs of others: a paragraph counts once.
            paragraphs = [p for p in topics[name].split("\n\n") if p not in seen]
            seen.update(paragraphs)
            yield "\n\n".join(paragraphs)
