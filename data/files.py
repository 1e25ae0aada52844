"""Local files of text: what they hold is found out from their first bytes, and what cannot be read is named."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lightning_gsq.data.documents import Document, accept

from lightning_gsq.errors import ConfigurationError

HEAD = 4096
BYTE_ORDER_MARKS = (
    # UTF-32 begins like UTF-16, so it comes first
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
NO_TEXT = (
    (b"PAR1", "a Parquet file; LocalShards reads those"),
    (b"\x1f\x8b", "compressed; decompress it, or give JSON lines (.jsonl.gz) to LocalShards"),
    (b"PK\x03\x04", "a zip archive or an office document; give its text"),
    (b"%PDF", "a PDF document; give its text"),
)
SHOWN_KEYS = 20


def local_path(path: str, option: str) -> Path:
    """A path of the file system, whether or not there is anything.

    Raises:
        ConfigurationError: nothing can ever be there: it is empty, too long, or below an unknown user's home.
    """
    if not isinstance(path, (str, Path)) or not str(path).strip():
        raise ConfigurationError(f"{option}: expected a file or a folder, got {path!r}")
    try:
        root = Path(path).expanduser()
        root.exists()
    except (OSError, RuntimeError) as error:
        shown = str(path) if len(str(path)) <= 100 else f"{str(path)[:100]}..."
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"{option}: {shown} cannot be used: {reason}") from error
    return root


def file_identity(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of change of each file: what tells whether a text is still the same.

    Raises:
        ConfigurationError: one of them is gone, or cannot be looked at.
    """
    identity = []
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise ConfigurationError(f"path: cannot read {file}: {error.strerror}") from error
        identity.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    return identity


def open_text(file: Path, option: str) -> TextIO:
    """A file of UTF-8 text, with or without a byte order mark, compressed if its name ends in ``.gz``.

    Raises:
        ConfigurationError: its first bytes say that it is something else.
    """
    stream: Any = gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # noqa: SIM115 - the caller closes it
    try:
        _check_head(file, stream.peek(HEAD)[:HEAD], option)
    except BaseException:
        stream.close()
        raise
    return io.TextIOWrapper(stream, encoding="utf-8-sig")


def read_text(file: Path, option: str) -> str:
    """All of a file's text.

    Raises:
        ConfigurationError: it is no UTF-8 text, or cannot be read.
    """
    with file_errors(file, option), open_text(file, option) as stream:
        return stream.read()


@contextmanager
def file_errors(file: Path, option: str, passing: bool = False) -> Iterator[None]:
    """Names a file that is not UTF-8, is damaged, or cannot be read.

    Args:
        file: The file that is read inside.
        option: Name of the option that gave it, for messages.
        passing: Let errors of the file system, which may pass, through.

    Raises:
        ConfigurationError: instead of what is raised inside.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{option}: cannot read {file}: it is not UTF-8 text (byte {error.start}: {error.reason}); convert it, for "
            f"example if it is Latin-1 with `iconv -f latin1 -t utf-8 {file.name}`"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigurationError(f"{option}: cannot read {file}: it is damaged or cut off: {error}") from error
    except OSError as error:
        if passing:
            raise
        raise ConfigurationError(f"{option}: cannot read {file}: {error.strerror or error}") from error


def json_lines(file: Path, field: str, option: str, first: int = 0) -> Iterator[tuple[Document | None, str]]:
    """The text of each line of a file, with its place; None for a blank line and for a null.

    Args:
        file: The file.
        field: Key of the text.
        option: Name of the option that gave the key, for messages.
        first: Lines to pass over.
    """
    begun = False
    with open_text(file, "path") as lines:
        for number, line in enumerate(lines, start=1):
            if number <= first:
                continue
            place = f"line {number} of {file}"
            if not line.strip():
                yield None, place
                continue
            if not (begun or first) and line.lstrip().startswith("["):
                raise ConfigurationError(
                    f"path: {file} holds one JSON array, not one JSON object a line; convert it, for example with "
                    f"`jq -c '.[]' {file.name} > {file.stem}.jsonl`"
                )
            begun = True
            yield accept(_field_of(line, field, option, place), option, place), place


def _check_head(file: Path, head: bytes, option: str) -> None:
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            raise ConfigurationError(
                f"{option}: cannot read {file}: it is {encoding} text, not UTF-8; convert it with `iconv -f "
                f"{encoding.lower()} -t utf-8 {file.name}`"
            )
    for magic, kind in NO_TEXT:
        if head.startswith(magic):
            raise ConfigurationError(f"{option}: cannot read {file} as text: it is {kind}")
    if head.count(0) > len(head) // 8:
        raise ConfigurationError(
            f"{option}: cannot read {file} as text: many of its bytes are 0, so it is UTF-16 without a mark (convert "
            f"it with `iconv -f utf-16le -t utf-8 {file.name}`) or no text at all"
        )


def _field_of(line: str, field: str, option: str, place: str) -> Any:
    """What a JSON line holds under a key."""
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ConfigurationError(f"path: {place} is nested too deep") from error
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise ConfigurationError(f"path: {place} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(record, dict) or field not in record:
        keys = sorted(record)[:SHOWN_KEYS] if isinstance(record, dict) else type(record).__name__
        raise ConfigurationError(f"{option}: {place} has no {field!r}; it has {keys}")
    return record[field]
