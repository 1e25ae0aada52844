"""Folders that an export may replace: those that an export made, and nothing else in the world.

An exported folder carries a mark, ``export.json``: the format, what the files were made from, and the digest of every
file. A folder without it, a symbolic link, or a folder that holds a file which the mark does not name is somebody
else's, whatever ``--overwrite`` says.

A new folder grows under a hidden name, ``.native.1a2b3c4d.partial``, and its writer holds a lock on it. What a killed
writer left is recognised by name and free lock, and cleaned up by the next export to the same place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_gsq.system.files import write_atomically
from lightning_gsq.system.fingerprint import file_digest

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing that might be in use is cleaned up
    fcntl = None  # type: ignore[assignment]

MARK = "export.json"
VERSION = 1


def write_mark(folder: Path, format_name: str, made_from: Mapping[str, Any], checked: bool) -> None:
    """Writes the mark of a folder whose other files are complete.

    Args:
        folder: The folder.
        format_name: Its format.
        made_from: What its files follow from, as plain data.
        checked: Whether it was loaded back.
    """
    files = {str(file.relative_to(folder)): file_digest(file) for file in _files(folder)}
    content = {
        "written_by": "lightning-gsq",
        "version": VERSION,
        "format": format_name,
        "made_from": made_from,
        "checked": checked,
        "files": files,
    }
    (folder / MARK).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_mark(folder: Path) -> dict[str, Any] | None:
    """The mark of a folder; None where there is none, or none that an export wrote."""
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(content, dict) and content.get("version") == VERSION and isinstance(content.get("files"), dict)
    return content if whole else None


def replace_text(folder: Path, name: str, text: str) -> None:
    """Gives a text file of an exported folder another content, which the mark then names."""
    mark = read_mark(folder)
    if mark is None or name not in mark["files"]:
        return
    write_atomically(folder / name, text.encode())
    mark["files"][name] = file_digest(folder / name)
    write_atomically(folder / MARK, (json.dumps(mark, indent=1) + "\n").encode())


def out_of_date(folder: Path, format_name: str, made_from: Mapping[str, Any], checked: bool) -> str | None:
    """Why a folder is not the whole and current export that it should be; None if it is.

    Args:
        folder: The folder.
        format_name: The format it should have.
        made_from: What its files should follow from.
        checked: Whether it should have been loaded back.
    """
    mark = None if folder.is_symlink() else read_mark(folder)
    if mark is None:
        return "it is not there"
    if mark["format"] != format_name or mark["made_from"] != json.loads(json.dumps(made_from)):
        return "it was made from something else"
    if checked and not mark["checked"]:
        return "it was not checked"
    for name, digest in mark["files"].items():
        file = folder / name
        if not file.is_file() or file_digest(file) != digest:
            return f"{name} is missing or damaged"
    return None


def obstacle(folder: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> str | None:
    """Why a folder cannot be written, with the way out; None if it can.

    Args:
        folder: The folder.
        overwrite: Whether an earlier export there may be replaced.
        inputs: Files and folders that the export reads.
    """
    if folder.is_symlink():
        return f"{folder} is a symbolic link, which no export made: remove it, or give another --output"
    if not folder.exists():
        return _no_room_above(folder)
    if not overwrite:
        return f"{folder} exists; use --overwrite to replace it, or another --output"
    for path in inputs:
        if path.resolve().is_relative_to(folder.resolve()):
            return f"{folder} holds {path}, which the export reads: give another --output"
    stranger = foreign(folder)
    if stranger is not None:
        return f"{stranger}, so that even --overwrite leaves it alone: move it away, or give another --output"
    return None


def foreign(folder: Path) -> str | None:
    """Why a folder is not one that an export made alone; None if it is, or if it is empty."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    files = {str(file.relative_to(folder)) for file in _files(folder)}
    if not files:
        return None
    mark = read_mark(folder)
    if mark is None:
        return f"{folder} was not written by an export (it has no {MARK})"
    others = sorted(files - set(mark["files"]))
    return f"{folder} holds {others[0]}, which no export wrote" if others else None


@contextmanager
def growing(folder: Path) -> Iterator[Path]:
    """A new, locked, hidden folder beside ``folder``; gone after the context unless :func:`publish` named it."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    lock = _locked(partial)
    try:
        yield partial
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def publish(partial: Path, folder: Path) -> None:
    """Gives a finished folder its name; an earlier export there goes away only once the new one stands.

    The caller has asked :func:`obstacle` just before. Everything is on the disk before any name changes.
    """
    for file in _files(partial):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    old = partial.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Cleans up beside ``folder`` what an export that was killed left there: its new folder, and the old one's name."""
    if not folder.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    leftovers = [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name) and _is_plain_folder(path)]
    for path in sorted(leftovers):  # an .old folder comes before its .partial one, whose lock says if it is in use
        lock = _locked(path.with_suffix(".partial") if path.with_suffix(".partial").exists() else path)
        if lock is None:
            continue
        if path.suffix == ".old" and not folder.exists() and not folder.is_symlink():
            with suppress(FileNotFoundError):  # another process has just done it
                path.rename(folder)
        elif path.suffix == ".partial" or foreign(path) is None:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _files(folder: Path) -> list[Path]:
    """Every file and link below a folder except the mark, in order; no link is followed."""
    files = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        files += [Path(root) / name for name in (*names, *links)]
    return sorted(file for file in files if file != folder / MARK)


def _no_room_above(folder: Path) -> str | None:
    """Why nothing can be made under this name."""
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        return f"{folder} cannot be made: {above} is not a folder"
    return None if os.access(above, os.W_OK | os.X_OK) else f"{folder} cannot be made: {above} is not writable"


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _locked(folder: Path) -> int | None:
    """A handle that holds the folder's lock; None where another process has it, or nothing can be locked."""
    if fcntl is None:
        return None
    handle = None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    if handle is not None:
        os.close(handle)
    return None
