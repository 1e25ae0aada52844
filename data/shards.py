"""Text in shards: what datasets of the Hugging Face library and local files have in common, and the former.

Shards are read as they come, from any shard and row on, and can be shuffled: the shards take a seeded order, and
documents are read in chunks of ``shuffle_buffer``, each of which is permuted. Against the usual buffer, which replaces
one document at a time, a chunk has a position that is small (where it began, how many of it are given) and exact: a
reader that goes on there reads one chunk again at the most and gives the same documents, where the other loses what its
buffer held.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from typing import Any

import torch
from lightning_gsq.data.documents import Document, accept
from lightning_gsq.data.files import file_identity, local_path
from lightning_gsq.data.sources import END, DocumentReader, Position, TextSource

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.hub import WAYS_OUT, say_cached, without_waiting
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
                if next(self.open_shard(shard, None), END) is not END:
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


@contextmanager
def damaged_files(name: str, *others: type[Exception], local: bool = True) -> Iterator[None]:
    """Names a damaged Parquet or JSON file, whichever of its many errors is raised.

    Args:
        name: What is read inside, for messages.
        others: Errors that say so beside those of pyarrow and of decompression.
        local: It lies on this machine. Of what comes over a network, a later attempt may get more.

    Raises:
        ConfigurationError: instead of what is raised inside.
    """
    from pyarrow import ArrowException

    try:
        yield
    except ConfigurationError:
        raise
    except (*others, ArrowException, ValueError, zlib.error, BadGzipFile) as error:
        raise ConfigurationError(f"path: cannot read {name}: {_line(error)}") from error
    except (EOFError, OSError) as error:
        # pyarrow's OSError for pages that it cannot decode has no number; those of a file system have one.
        if not local or getattr(error, "errno", None) is not None:
            raise
        raise ConfigurationError(f"path: cannot read {name}: it is damaged or cut off: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _ChunkReader(DocumentReader):
    """Position: the chunk's number, the shard (in reading order) and row where it begins, how many of it are given."""

    def __init__(self, source: ShardedSource, position: Position | None) -> None:
        position = position or {"chunk": 0, "shard": 0, "row": None, "given": 0}
        self._source = source
        self._number, self._given = int(position["chunk"]), int(position["given"])
        self._begin: tuple[int, Position | None] = int(position["shard"]), position["row"]
        self._end = self._begin
        self._chunk: list[tuple[Document, str]] | None = None
        self._place = ""
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
        document, self._place = self._chunk[self._given]
        self._given += 1
        return document

    @property
    def position(self) -> Position:
        shard, row = self._begin
        return {"chunk": self._number, "shard": shard, "row": row, "given": self._given}

    @property
    def place(self) -> str:
        return self._place

    def _read_chunk(self) -> list[tuple[Document, str]]:
        size = self._source.shuffle_buffer or 1
        index, row = self._begin
        chunk: list[tuple[Document, str]] = []
        while len(chunk) < size and index < len(self._order):
            if self._shard is None:
                self._shard = self._source.open_shard(self._order[index], row)
            document = next(self._shard, END)
            if document is END:
                index, row, self._shard = index + 1, None, None
            else:
                chunk.append((document, self._shard.place))
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
        folder = local_path(self.path, "path")
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
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return local_path(self.path, "path").is_dir()

    @functools.cached_property
    def _dataset(self) -> Any:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        name = f"the dataset {self.path!r}"
        with contextlib.nullcontext() if self.is_local else without_waiting() as reason:
            try:
                with damaged_files(name, DatasetsError, local=self.is_local):
                    dataset = load_dataset(
                        self.path, self.name, split=self.split, streaming=self.streaming, revision=self.revision
                    )
            except (ConfigurationError, OSError) as error:
                if reason is not None:  # and the cache of ``datasets`` does not hold it
                    out_of_reach = f"path: {name} is out of reach of this machine ({reason}); {WAYS_OUT}"
                    raise ConfigurationError(out_of_reach) from error
                if isinstance(error, FileNotFoundError):
                    raise ConfigurationError(f"path: cannot read {name}: {error}") from error
                raise
        if reason is not None:
            say_cached(name, reason)
        return dataset if self.streaming else dataset.to_iterable_dataset()


class _DatasetReader(DocumentReader):
    def __init__(self, source: HuggingFaceDataset, dataset: Any, row: Position | None) -> None:
        from datasets.exceptions import DatasetsError

        self._source, self._dataset, self._errors = source, dataset, (DatasetsError,)
        if row is not None:
            dataset.load_state_dict(row)
        self._rows = iter(dataset)
        self._read, self._place = 0, ""
        self._since = "" if row is None else ", counted from where reading went on"

    def __next__(self) -> Document:
        source = self._source
        while True:
            with damaged_files(source.describe(), *self._errors, local=source.is_local):
                row = next(self._rows)
            self._read += 1
            if source.column not in row:
                raise ConfigurationError(f"column: {source.path} has no column {source.column!r}; it has {sorted(row)}")
            self._place = f"row {self._read} of a shard of {source.describe()}{self._since}"
            document = accept(row[source.column], "column", self._place)
            if document is not None:
                return document

    @property
    def position(self) -> Position:
        state: Position = self._dataset.state_dict()
        return state

    @property
    def place(self) -> str:
        return self._place
