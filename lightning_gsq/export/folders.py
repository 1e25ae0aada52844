"""Folders that an export may replace: those that an export made, and nothing else in the world.

An exported folder carries a mark, ``export.json``: the format, what the files were made from, and the digest of every
file. A folder without it, a symbolic link, or a folder that holds a file which the mark does not name is somebody
else's, whatever ``--overwrite`` says.

A new folder grows under a hidden name, ``.native.1a2b3c4d.partial``, and its writer holds a lock on it. What a killed
writer left is recognised by name and free lock, and cleaned up by the next export to the same place.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_gsq.system import owned_folders

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing that might be in use is cleaned up
    fcntl = None  # type: ignore[assignment]

MARK = "export.json"
VERSION = 2


def write_mark(folder: Path, format_name: str, made_from: Mapping[str, Any], checked: bool) -> None:
    """Writes the mark of a folder whose other files are complete.

    Args:
        folder: The folder.
        format_name: Its format.
        made_from: What its files follow from, as plain data.
        checked: Whether it was loaded back.
    """
    owned_folders.write_mark(folder, MARK, {**_identity(format_name, made_from), "checked": checked})


def out_of_date(folder: Path, format_name: str, made_from: Mapping[str, Any], checked: bool) -> str | None:
    """Why a folder is not the whole and current export that it should be; None if it is.

    Args:
        folder: The folder.
        format_name: The format it should have.
        made_from: What its files should follow from.
        checked: Whether it should have been loaded back.
    """
    reason = owned_folders.out_of_date(folder, MARK, _identity(format_name, made_from))
    if reason is None and checked and not (owned_folders.read_mark(folder, MARK) or {}).get("checked"):
        return "it was not checked"
    return reason


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
    files = {str(file.relative_to(folder)) for file in owned_folders.files_of(folder, MARK)}
    if not files:
        return None
    mark = owned_folders.read_mark(folder, MARK)
    if mark is None:
        return f"{folder} was not written by an export (it has no {MARK})"
    others = sorted(files - set(mark["files"]))
    return f"{folder} holds {others[0]}, which no export wrote" if others else None


@contextmanager
def growing(folder: Path) -> Iterator[Path]:
    """A new, locked, hidden folder beside ``folder``; gone after the context unless :func:`publish` named it."""
    with owned_folders.growing(folder) as partial:
        lock = _locked(partial)
        try:
            yield partial
        finally:
            if lock is not None:
                os.close(lock)


def publish(partial: Path, folder: Path) -> None:
    """Gives a finished folder its name; an earlier export there goes away only once the new one stands.

    The caller has asked :func:`obstacle` just before. Everything is on the disk before any name changes.
    """
    owned_folders.publish(partial, folder, MARK)


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


def _identity(format_name: str, made_from: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": VERSION, "format": format_name, "made_from": made_from}


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
