"""Local Parquet and JSON-lines files as one source of text.

They are read here rather than through the ``datasets`` library, which wants every line of a JSON file to have the same
columns of the same types, where calibration needs one of them.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lightning_gsq.data.shards import ShardedSource
from lightning_gsq.data.sources import Document, DocumentReader, Position, field_of, file_identity

from lightning_gsq.errors import ConfigurationError

SHARD_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz")


class LocalShards(ShardedSource):
    """Local Parquet and JSON-lines files, read row by row without loading any of them whole.

    Args:
        path: A file, a folder (its .parquet, .jsonl, .jsonl.gz and .json.gz files, those of subfolders too, in the
            order of their names), or a pattern such as ``data/*/train-*.parquet``.
        column: Column of a Parquet file, or key of a JSON line, that holds the text; one of message lists is read as
            conversations.
        shuffle_buffer: Files are read in a random order, and this many documents shuffled among themselves; null for
            the order of names.
        seed: Seed of the shuffling.
    """

    def __init__(self, path: str, column: str = "text", shuffle_buffer: int | None = None, seed: int = 0) -> None:
        super().__init__(column, shuffle_buffer, seed)
        self.path = path

    def describe(self) -> str:
        """See :meth:`ShardedSource.describe`."""
        return self.path

    def identity(self) -> dict[str, Any]:
        """See :meth:`TextSource.identity`."""
        return {
            "LocalShards": file_identity(self._files),
            "column": self.column,
            "shuffle": [self.shuffle_buffer, self.seed] if self.shuffle_buffer else None,
        }

    def num_shards(self) -> int:
        """See :meth:`ShardedSource.num_shards`."""
        return len(self._files)

    def open_shard(self, index: int, row: Position | None) -> DocumentReader:
        """See :meth:`ShardedSource.open_shard`."""
        file = self._files[index]
        rows = self._parquet_rows if file.suffix == ".parquet" else self._json_rows
        return _RowReader(rows, file, row["rows"] if row else 0)

    @functools.cached_property
    def _files(self) -> list[Path]:
        root = Path(self.path).expanduser()
        if root.is_dir():
            files = sorted(p for p in root.rglob("*") if p.name.endswith(SHARD_SUFFIXES))
            if not files:
                raise ConfigurationError(f"path: the folder {root} holds no file of {', '.join(SHARD_SUFFIXES)}")
            return files
        files = [root] if root.is_file() else sorted(p for p in _matches(root) if p.is_file())
        if not files:
            raise ConfigurationError(f"path: there is no file, folder or match of the pattern {root}")
        for file in files:
            if not file.name.endswith((*SHARD_SUFFIXES, ".json")):
                raise ConfigurationError(f"path: {file} is none of {', '.join(SHARD_SUFFIXES)}; convert it")
        return files

    def _parquet_rows(self, file: Path, first: int) -> Iterator[Document | None]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(file) as content:
                if self.column not in content.schema_arrow.names:
                    raise ConfigurationError(
                        f"column: {file} has no column {self.column!r}; it has {sorted(content.schema_arrow.names)}"
                    )
                for group in range(content.num_row_groups):
                    rows = content.metadata.row_group(group).num_rows
                    if first >= rows:
                        first -= rows
                        continue
                    for batch in content.iter_batches(256, row_groups=[group], columns=[self.column]):
                        for value in batch.column(0).slice(first):
                            yield self.accept(value.as_py(), str(file))
                        first = max(0, first - len(batch))
        except pyarrow.ArrowInvalid as error:
            raise ConfigurationError(f"path: cannot read {file}: {error}") from error

    def _json_rows(self, file: Path, first: int) -> Iterator[Document | None]:
        try:
            with _open_text(file) as lines:
                for number, line in enumerate(lines):
                    if number < first:
                        continue
                    where = f"line {number + 1} of {file}"
                    yield self.accept(field_of(line, self.column, "column", where), where) if line.strip() else None
        except (UnicodeDecodeError, gzip.BadGzipFile) as error:
            raise ConfigurationError(f"path: cannot read {file}: {error}") from error


def _open_text(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _matches(pattern: Path) -> Iterator[Path]:
    """Files of a shell pattern, from its first part without a wildcard on."""
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return Path(*parts[:fixed]).glob(str(Path(*parts[fixed:]))) if fixed < len(parts) else iter(())


class _RowReader(DocumentReader):
    """Position: rows read, those without text included."""

    def __init__(self, rows: Any, file: Path, first: int) -> None:
        self._rows, self._read = rows(file, first), first

    def __next__(self) -> Document:
        while True:
            document: Document | None = next(self._rows)
            self._read += 1
            if document is not None:
                return document

    @property
    def position(self) -> Position:
        return {"rows": self._read}
