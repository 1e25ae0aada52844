"""Local text files as a source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_gsq.data.documents import Document
from lightning_gsq.data.files import file_errors, file_identity, json_lines, local_path, read_text
from lightning_gsq.data.sources import TextSource

from lightning_gsq.errors import ConfigurationError

TABLES = {".csv", ".tsv"}


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
        return (document for document, _ in self._placed())

    def identity(self) -> dict[str, Any]:
        """See :meth:`TextSource.identity`."""
        return {"TextFile": file_identity(self._files()), "field": self.field, "rows": self.rows}

    def _placed(self) -> Iterator[tuple[Document, str]]:
        empty = True
        for file in self._files():
            with file_errors(file, "path"):
                for document, place in self._read(file):
                    if document is not None:
                        empty = False
                        yield document, place
        if empty:
            raise ConfigurationError(f"path: {self.path} is empty: it holds no text")

    def _files(self) -> list[Path]:
        root = local_path(self.path, "path")
        if root.is_dir():
            files = sorted(p for p in root.rglob("*") if p.suffix in {".txt", ".md", ".jsonl"})
            if not files:
                raise ConfigurationError(f"path: the folder {root} holds no .txt, .md or .jsonl file")
            return files
        if root.is_file():
            return [root]
        raise ConfigurationError(f"path: there is no file or folder {root}")

    def _read(self, file: Path) -> Iterator[tuple[Document | None, str]]:
        if file.suffix in {".jsonl", ".json"}:
            yield from json_lines(file, self.field, "field")
            return
        if file.suffix in TABLES:
            raise ConfigurationError(
                f"path: {file} is a table, of which one column is the text; write that column to a .txt file, or the "
                "table as JSON lines"
            )
        text = read_text(file, "path")
        if not text.strip():
            return
        if self.rows:
            yield from ((row, f"line {n} of {file}") for n, row in enumerate(_rows(text), start=1))
        else:
            yield text, str(file)


def _rows(text: str) -> list[str]:
    lines = text.removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]
