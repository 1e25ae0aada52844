"""Text in shards: what datasets of the Hugging Face library and local files have in common, and the former.

Shards are read as they come, from any shard and row on, and can be shuffled: the shards take a seeded order, and
documents are read in chunks of ``shuffle_buffer``, each of which is permuted. Against the usual buffer, which replaces
one document at a time, a chunk has a position that is small (where it began, how many of it are given) and exact: a
reader that goes on there reads one chunk again at the most and gives the same documents, where the other loses what its
buffer held.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning_gsq.data.sources import Document, DocumentReader, Position, TextSource, file_identity

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.seeding import generator_of


class ShardedSource(TextSource):
    """Documents in the rows of some shards.

    Args:
        column: Column of the text.
        shuffle_buffer: Documents that are shuffled among themselves; None for the order of the shards.
        seed: Seed of the order.
    """

    def __init__(self, column: str, shuffle_buffer: int | None, seed: int) -> None:
        if shuffle_buffer is not None and shuffle_buffer < 2:
            raise ConfigurationError(
                f"shuffle_buffer must be at least 2, or null for no shuffling, got {shuffle_buffer}"
            )
        self.column, self.shuffle_buffer, self.seed = column, shuffle_buffer, seed

    @abstractmethod
    def num_shards(self) -> int:
        """How many shards there are."""

    @abstractmethod
    def open_shard(self, index: int, row: Position | None) -> DocumentReader:
        """The documents of a shard, from a row on; None for the first."""

    @abstractmethod
    def describe(self) -> str:
        """The source, for messages."""

    def check(self) -> None:
        """See :meth:`TextSource.check`; reads one document, not a whole buffer."""
        try:
            for shard in range(self.num_shards()):
                if next(self.open_shard(shard, None), None) is not None:
                    return
        except OSError as error:
            raise ConfigurationError(f"path: cannot read {self.describe()}: {error}") from error
        raise ConfigurationError(f"path: {self.describe()} is empty")

    def documents(self) -> DocumentReader:
        """See :meth:`TextSource.documents`."""
        return self.reader()

    def reader(self, position: Position | None = None) -> DocumentReader:
        """See :meth:`TextSource.reader`."""
        return _ChunkReader(self, position)

    def accept(self, value: Any, where: str) -> Document | None:
        """A row's text; None where the row has none.

        Raises:
            ConfigurationError: it is neither text nor chat messages.
        """
        if value is None or isinstance(value, (str, list)):
            return value
        raise ConfigurationError(
            f"column: {self.column!r} of {where} holds {type(value).__name__}, not text or chat messages"
        )


class _ChunkReader(DocumentReader):
    """Position: the chunk's number, the shard (in reading order) and row where it begins, how many of it are given."""

    def __init__(self, source: ShardedSource, position: Position | None) -> None:
        position = position or {"chunk": 0, "shard": 0, "row": None, "given": 0}
        self._source = source
        self._number, self._given = int(position["chunk"]), int(position["given"])
        self._begin: tuple[int, Position | None] = int(position["shard"]), position["row"]
        self._end = self._begin
        self._chunk: list[Document] | None = None
        self._shard: DocumentReader | None = None
        count = source.num_shards()
        self._order = list(range(count))
        if source.shuffle_buffer:
            self._order = torch.randperm(count, generator=generator_of("shards", source.seed)).tolist()

    def __next__(self) -> Document:
        if self._chunk is None:
            self._chunk = self._read_chunk()
        if self._chunk and self._given == len(self._chunk):
            self._number, self._given, self._begin = self._number + 1, 0, self._end
            self._chunk = None
            self._chunk = self._read_chunk()
        if not self._chunk:
            if self._number == 0:
                raise ConfigurationError(f"path: {self._source.describe()} is empty")
            raise StopIteration
        self._given += 1
        return self._chunk[self._given - 1]

    @property
    def position(self) -> Position:
        shard, row = self._begin
        return {"chunk": self._number, "shard": shard, "row": row, "given": self._given}

    def _read_chunk(self) -> list[Document]:
        size = self._source.shuffle_buffer or 1
        index, row = self._begin
        chunk: list[Document] = []
        while len(chunk) < size and index < len(self._order):
            if self._shard is None:
                self._shard = self._source.open_shard(self._order[index], row)
            document = next(self._shard, None)
            if document is None:
                index, row, self._shard = index + 1, None, None
            else:
                chunk.append(document)
        self._end = index, None if self._shard is None else self._shard.position
        if self._source.shuffle_buffer:
            order = torch.randperm(len(chunk), generator=generator_of("shuffle", self._source.seed, self._number))
            chunk = [chunk[i] for i in order.tolist()]
        return chunk


class HuggingFaceDataset(ShardedSource):
    """A dataset of the ``datasets`` library, streamed.

    Args:
        path: Name on the hub, or a local folder of the same layout.
        name: Configuration of the dataset, such as ``en``.
        split: Split to read.
        column: Column of the text; a column of message lists is read as conversations.
        streaming: Read as it comes, without downloading the whole first.
        revision: Branch, tag or commit on the hub.
        shuffle_buffer: Shards are read in a random order, and this many documents shuffled among themselves; null for
            the dataset's order.
        seed: Seed of the shuffling.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        streaming: bool = True,
        revision: str | None = None,
        shuffle_buffer: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(column, shuffle_buffer, seed)
        self.path, self.name, self.split = path, name, split
        self.streaming, self.revision = streaming, revision

    def describe(self) -> str:
        """See :meth:`ShardedSource.describe`."""
        return f"the dataset {self.path!r}, split {self.split!r}"

    def identity(self) -> dict[str, Any]:
        """See :meth:`TextSource.identity`; what a branch of the hub points to today is not part of it."""
        folder = Path(self.path).expanduser()
        return {
            "HuggingFaceDataset": [self.path, self.name, self.split, self.column, self.revision],
            "files": file_identity(sorted(p for p in folder.rglob("*") if p.is_file())) if folder.is_dir() else None,
            "shuffle": [self.shuffle_buffer, self.seed] if self.shuffle_buffer else None,
        }

    def num_shards(self) -> int:
        """See :meth:`ShardedSource.num_shards`."""
        return int(self._dataset.num_shards)

    def open_shard(self, index: int, row: Position | None) -> DocumentReader:
        """See :meth:`ShardedSource.open_shard`."""
        return _DatasetReader(self, self._dataset.shard(self.num_shards(), index), row)

    @functools.cached_property
    def _dataset(self) -> Any:
        from datasets import load_dataset

        try:
            dataset = load_dataset(
                self.path, self.name, split=self.split, streaming=self.streaming, revision=self.revision
            )
        except (FileNotFoundError, ValueError) as error:
            raise ConfigurationError(f"path: cannot read the dataset {self.path!r}: {error}") from error
        return dataset if self.streaming else dataset.to_iterable_dataset()


class _DatasetReader(DocumentReader):
    def __init__(self, source: HuggingFaceDataset, dataset: Any, row: Position | None) -> None:
        self._source, self._dataset = source, dataset
        if row is not None:
            dataset.load_state_dict(row)
        self._rows = iter(dataset)

    def __next__(self) -> Document:
        source = self._source
        while True:
            try:
                row = next(self._rows)
            except ValueError as error:  # a row that does not fit the dataset's columns, a damaged file
                raise ConfigurationError(f"path: cannot read the dataset {source.path!r}: {error}") from error
            if source.column not in row:
                raise ConfigurationError(f"column: {source.path} has no column {source.column!r}; it has {sorted(row)}")
            document = source.accept(row[source.column], source.path)
            if document is not None:
                return document

    @property
    def position(self) -> Position:
        state: Position = self._dataset.state_dict()
        return state
