"""Where calibration text comes from. Each source yields documents, and can go on in the middle of them.

A *position* is plain data (what JSON can hold) that says which document comes next; ``source.reader(position)`` goes on
there. A source whose documents are cheap to produce again only counts them; one that reads over a network or many large
files overrides :meth:`TextSource.reader`.
"""

from __future__ import annotations

import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.seeding import seed_of

Document = str | list[dict[str, str]]
"""Plain text, or chat messages."""
Position = dict[str, Any]
"""Where a reader stands, as plain data."""


class DocumentReader(Iterator[Document]):
    """Documents from a position on.

    ``position`` is that of the first document not handed out yet, also after ``next`` has raised an error: a new reader
    from there goes on without a gap.
    """

    @property
    @abstractmethod
    def position(self) -> Position:
        """Where this reader stands."""


class TextSource(ABC):
    """A stream of documents."""

    needs_model: bool = False
    """Whether :meth:`documents` needs the model itself, loaded. Such text belongs to one run, not to several."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yields documents: plain text, or chat messages where the source holds conversations.

        Raises:
            ConfigurationError: the source is missing, empty or unreadable.
        """

    def reader(self, position: Position | None = None) -> DocumentReader:
        """The documents from a position on; None for the beginning."""
        return _CountingReader(self, position)

    def identity(self) -> dict[str, Any] | None:
        """What the text depends on, as plain data: equal identities mean equal text. None if that cannot be said."""
        return None

    def check(self) -> None:
        """Verifies, before any long work, that the source can be read: asks it for its first document."""
        next(iter(self.documents()))


class _CountingReader(DocumentReader):
    """Counts documents; goes on by passing over those already read."""

    def __init__(self, source: TextSource, position: Position | None) -> None:
        self._documents = source.documents()
        self._count = 0
        for _ in range(position["documents"] if position else 0):
            next(self)

    def __next__(self) -> Document:
        document = next(self._documents)
        self._count += 1
        return document

    @property
    def position(self) -> Position:
        return {"documents": self._count}


def file_identity(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of change of each file: what tells whether a text is still the same."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


class TextFile(TextSource):
    """Local text files: ``.jsonl`` lines hold one document each, any other file is one document.

    Args:
        path: A file, or a folder whose ``.txt``, ``.md`` and ``.jsonl`` files are read in the order of their names.
        field: The key of the text in JSON lines; ``messages`` for conversations.
        rows: Every line of a text file is a document, blank ones too: the layout of WikiText's raw files.
    """

    def __init__(self, path: str, field: str = "text", rows: bool = False) -> None:
        self.path, self.field, self.rows = path, field, rows

    def documents(self) -> Iterator[Document]:
        """See :meth:`TextSource.documents`."""
        empty = True
        for file in self._files():
            for document in self._read(file):
                empty = False
                yield document
        if empty:
            raise ConfigurationError(f"path: {Path(self.path).expanduser()} is empty; calibration needs text")

    def identity(self) -> dict[str, Any]:
        """See :meth:`TextSource.identity`."""
        return {"TextFile": file_identity(self._files()), "field": self.field, "rows": self.rows}

    def _files(self) -> list[Path]:
        root = Path(self.path).expanduser()
        if root.is_dir():
            files = sorted(p for p in root.rglob("*") if p.suffix in {".txt", ".md", ".jsonl"})
            if not files:
                raise ConfigurationError(f"path: the folder {root} holds no .txt, .md or .jsonl file")
            return files
        if root.is_file():
            return [root]
        raise ConfigurationError(f"path: there is no file or folder {root}")

    def _read(self, file: Path) -> Iterator[Document]:
        try:
            if file.suffix not in {".jsonl", ".json"}:
                text = file.read_text(encoding="utf-8")
                if text.strip():
                    yield from (_rows(text) if self.rows else [text])
                return
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield field_of(line, self.field, "field", f"line {number} of {file}")
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"path: {file} is not UTF-8 text (byte {error.start}: {error.reason}); convert it, for example with "
                f"`iconv -f latin1 -t utf-8 {file.name}`"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"path: cannot read {file}: {error.strerror}") from error


def field_of(line: str, field: str, option: str, where: str) -> Document:
    """The text of one JSON line.

    Args:
        line: The line.
        field: Key of the text.
        option: Name of the option that gave the key, for messages.
        where: The line's number and file, for messages.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"path: {where} is not JSON: {error.msg}") from error
    if not isinstance(record, dict) or field not in record:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ConfigurationError(f"{option}: {where} has no {field!r}; it has {keys}")
    value: Document = record[field]
    return value


def _rows(text: str) -> list[str]:
    lines = text.removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]


class PythonDocumentation(TextSource):
    """The reference texts of Python's own standard library (``pydoc_data.topics``): always there, no network.

    Args:
        part: "calibration" for nine topics of ten, "evaluation" for the others, or "all".
    """

    def __init__(self, part: str = "calibration") -> None:
        if part not in {"calibration", "evaluation", "all"}:
            raise ConfigurationError(f"part must be 'calibration', 'evaluation' or 'all', got {part!r}")
        self.part = part

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


class ModelSamples(TextSource):
    """Text that the model writes itself, from its start token: calibration without any data.

    Args:
        num_tokens: Tokens to sample in all.
        length: Tokens of one sample.
        temperature: Sampling temperature.
        top_p: Nucleus of the sampling distribution.
        seed: Seed of the samples.
        batch_size: Samples written at once.
    """

    needs_model = True

    def __init__(
        self,
        num_tokens: int = 100_000,
        length: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.num_tokens, self.length, self.temperature, self.top_p = num_tokens, length, temperature, top_p
        self.seed, self.batch_size = seed, batch_size
        self._texts: list[str] | None = None

    def check(self) -> None:
        """Nothing can be missing: the model is checked where it is loaded."""

    def identity(self) -> dict[str, Any]:
        """See :meth:`TextSource.identity`; among the runs of one model."""
        names = ("num_tokens", "length", "temperature", "top_p", "seed", "batch_size")
        return {"ModelSamples": {name: getattr(self, name) for name in names}}

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the samples; :meth:`documents` yields them afterwards."""
        start = next(
            (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None),
            None,
        )
        if start is None:
            raise ConfigurationError("ModelSamples: the tokenizer has neither a start nor an end token to begin with")
        self._texts = []
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, torch.bfloat16):
            torch.manual_seed(seed_of("samples", self.seed))
            left = -(-self.num_tokens // self.length)
            while left > 0:
                count = min(left, self.batch_size)
                generate: Any = model.generate
                ids = generate(
                    torch.full((count, 1), start, device=device),
                    attention_mask=torch.ones(count, 1, dtype=torch.long, device=device),
                    do_sample=True,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    top_k=0,
                    max_new_tokens=self.length,
                    min_new_tokens=self.length,
                    pad_token_id=start,
                )
                self._texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
                left -= count

    def documents(self) -> Iterator[str]:
        """See :meth:`TextSource.documents`."""
        if self._texts is None:
            raise RuntimeError("attach the model first")
        yield from self._texts
