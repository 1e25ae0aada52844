"""Where calibration text comes from. Each source yields documents as strings."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.noise import seed_of


class TextSource(ABC):
    """A stream of documents."""

    needs_model: bool = False
    """Whether :meth:`documents` needs the model itself, loaded."""

    @abstractmethod
    def documents(self) -> Iterator[str | list[dict[str, str]]]:
        """Yields documents: plain text, or chat messages where the source holds conversations.

        Raises:
            ConfigurationError: the source is missing, empty or unreadable.
        """

    def check(self) -> None:
        """Verifies, before any long work, that the source can be read: asks it for its first document."""
        next(iter(self.documents()))


class TextFile(TextSource):
    """Local text files: ``.jsonl`` lines hold one document each, any other file is one document.

    Args:
        path: A file, or a folder whose ``.txt``, ``.md`` and ``.jsonl`` files are read in the order of their names.
        field: The key of the text in JSON lines; ``messages`` for conversations.
        rows: Every line of a text file is a document, blank ones too: the layout of WikiText's raw files.
    """

    def __init__(self, path: str, field: str = "text", rows: bool = False) -> None:
        self.path, self.field, self.rows = path, field, rows

    def documents(self) -> Iterator[str | list[dict[str, str]]]:
        """See :meth:`TextSource.documents`."""
        root = Path(self.path).expanduser()
        if root.is_dir():
            files = sorted(p for p in root.rglob("*") if p.suffix in {".txt", ".md", ".jsonl"})
            if not files:
                raise ConfigurationError(f"path: the folder {root} holds no .txt, .md or .jsonl file")
        elif root.is_file():
            files = [root]
        else:
            raise ConfigurationError(f"path: there is no file or folder {root}")
        empty = True
        for file in files:
            for document in self._read(file):
                empty = False
                yield document
        if empty:
            raise ConfigurationError(f"path: {root} is empty; calibration needs text")

    def _read(self, file: Path) -> Iterator[str | list[dict[str, str]]]:
        try:
            if file.suffix not in {".jsonl", ".json"}:
                text = file.read_text(encoding="utf-8")
                if text.strip():
                    yield from (_rows(text) if self.rows else [text])
                return
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield self._field(file, number, line)
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"path: {file} is not UTF-8 text (byte {error.start}: {error.reason}); convert it, for example with "
                f"`iconv -f latin1 -t utf-8 {file.name}`"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"path: cannot read {file}: {error.strerror}") from error

    def _field(self, file: Path, number: int, line: str) -> str | list[dict[str, str]]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"path: line {number} of {file} is not JSON: {error.msg}") from error
        if not isinstance(record, dict) or self.field not in record:
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ConfigurationError(f"field: line {number} of {file} has no {self.field!r}; it has {keys}")
        value: str | list[dict[str, str]] = record[self.field]
        return value


def _rows(text: str) -> list[str]:
    lines = text.removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]


class HuggingFaceDataset(TextSource):
    """A dataset of the ``datasets`` library, streamed.

    Args:
        path: Name on the hub, or a local folder or loading script of the same layout.
        name: Configuration of the dataset, such as ``en``.
        split: Split to read.
        column: Column of the text; a column of message lists is read as conversations.
        streaming: Read as it comes, without downloading the whole first.
        revision: Branch, tag or commit on the hub.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        streaming: bool = True,
        revision: str | None = None,
    ) -> None:
        self.path, self.name, self.split, self.column = path, name, split, column
        self.streaming, self.revision = streaming, revision

    def documents(self) -> Iterator[str | list[dict[str, str]]]:
        """See :meth:`TextSource.documents`."""
        from datasets import load_dataset

        try:
            dataset = load_dataset(
                self.path, self.name, split=self.split, streaming=self.streaming, revision=self.revision
            )
            empty = True
            for row in dataset:
                empty = False
                if self.column not in row:
                    raise ConfigurationError(f"column: {self.path} has no column {self.column!r}; it has {sorted(row)}")
                yield row[self.column]
        except (FileNotFoundError, ConnectionError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"path: cannot read the dataset {self.path!r}: {error}") from error
        if empty:
            raise ConfigurationError(f"path: the dataset {self.path!r}, split {self.split!r}, is empty")


class PythonDocumentation(TextSource):
    """The reference texts of Python's own standard library (``pydoc_data.topics``): always there, no network.

    Args:
        part: "calibration" for nine topics of ten, "evaluation" for the others, or "all".
    """

    def __init__(self, part: str = "calibration") -> None:
        if part not in {"calibration", "evaluation", "all"}:
            raise ConfigurationError(f"part must be 'calibration', 'evaluation' or 'all', got {part!r}")
        self.part = part

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


class Mixture(TextSource):
    """Documents of several sources, one from each in turn until all are used up.

    Args:
        sources: The sources.
    """

    def __init__(self, sources: list[TextSource]) -> None:
        if not sources:
            raise ConfigurationError("sources: a mixture needs at least one source")
        self.sources = sources
        self.needs_model = any(source.needs_model for source in sources)

    def check(self) -> None:
        """Checks every source."""
        for source in self.sources:
            source.check()

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hands the model to the sources that need it."""
        for source in self.sources:
            if isinstance(source, (ModelSamples, Mixture)) and source.needs_model:
                source.attach(model, tokenizer)

    def documents(self) -> Iterator[str | list[dict[str, str]]]:
        """See :meth:`TextSource.documents`."""
        streams = [source.documents() for source in self.sources]
        while streams:
            for stream in list(streams):
                try:
                    yield next(stream)
                except StopIteration:
                    streams.remove(stream)
