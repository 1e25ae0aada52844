"""Local Parquet and JSON-lines files as one source of text.

They are read here rather than through the ``datasets`` library, which wants every line of a JSON file to have the same
columns of the same types, where calibration needs one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_gsq.data.documents import Document, accept
from lightning_gsq.data.files import file_errors, file_identity, json_lines, local_path
from lightning_gsq.data.shards import ShardedSource, damaged_files
from lightning_gsq.data.sources import DocumentReader, Position

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
        root = local_path(self.path, "path")
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

    def _parquet_rows(self, file: Path, first: int) -> Iterator[tuple[Document | None, str]]:
        from pyarrow import parquet

        number = 0
        with damaged_files(str(file)), parquet.ParquetFile(file) as content:
            if self.column not in content.schema_arrow.names:
                raise ConfigurationError(
                    f"column: {file} has no column {self.column!r}; it has {sorted(content.schema_arrow.names)}"
                )
            for group in range(content.num_row_groups):
                rows = content.metadata.row_group(group).num_rows
                if number + rows <= first:
                    number += rows
                    continue
                for batch in content.iter_batches(256, row_groups=[group], columns=[self.column]):
                    start = max(0, first - number)
                    for row, value in enumerate(batch.column(0).slice(start), start=number + start + 1):
                        place = f"row {row} of {file}"
                        yield accept(value.as_py(), "column", place), place
                    number += len(batch)

    def _json_rows(self, file: Path, first: int) -> Iterator[tuple[Document | None, str]]:
        with file_errors(file, "path", passing=True):
            yield from json_lines(file, self.column, "column", first)


def _matches(pattern: Path) -> Iterator[Path]:
    """Files of a shell pattern, from its first part without a wildcard on."""
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return Path(*parts[:fixed]).glob(str(Path(*parts[fixed:]))) if fixed < len(parts) else iter(())


class _RowReader(DocumentReader):
    """Position: rows read, those without text included."""

    def __init__(self, rows: Any, file: Path, first: int) -> None:
        self._rows, self._read, self._place = rows(file, first), first, ""

    def __next__(self) -> Document:
        while True:
            document: Document | None
            document, place = next(self._rows)
            self._read += 1
            if document is not None:
                self._place = place
                return document

    @property
    def position(self) -> Position:
        return {"rows": self._read}

    @property
    def place(self) -> str:
        return self._place
