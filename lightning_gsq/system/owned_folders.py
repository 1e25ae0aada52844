"""Folders that may be replaced: those that were written here, and nothing else in the world.

Such a folder carries a mark, a JSON file that says what it was made from and names every other file with its digest.
A folder without it, or a symbolic link, is somebody else's. A file in it that the mark does not name is somebody
else's, too, and moves along when the folder is replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_gsq.system.files import hidden_name, sync_folder, write_atomically
from lightning_gsq.system.fingerprint import file_digest


def write_mark(folder: Path, mark: str, content: Mapping[str, Any]) -> None:
    """Writes the mark of a folder whose other files are complete.

    Args:
        folder: The folder.
        mark: Name of the mark's file.
        content: What it says beside the files.
    """
    files = {str(file.relative_to(folder)): _entry(file, file_digest(file)) for file in files_of(folder, mark)}
    text = json.dumps({"written_by": "lightning-gsq", **content, "files": files}, indent=1)
    (folder / mark).write_text(text + "\n", encoding="utf-8")


def read_mark(folder: Path, mark: str) -> dict[str, Any] | None:
    """The mark of a folder; None where there is none, or none that was written here."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    try:
        content = json.loads((folder / mark).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("written_by") != "lightning-gsq":
        return None
    files = content.get("files")
    return content if isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values()) else None


def replace_file(folder: Path, mark: str, name: str, content: bytes) -> None:
    """Gives a file of such a folder another content, which the mark then names; nothing where it names none of it."""
    marked = read_mark(folder, mark)
    if marked is None or name not in marked["files"]:
        return
    write_atomically(folder / name, content)
    marked["files"][name] = _entry(folder / name, file_digest(folder / name))
    write_atomically(folder / mark, (json.dumps(marked, indent=1) + "\n").encode())


def out_of_date(folder: Path, mark: str, content: Mapping[str, Any]) -> str | None:
    """Why a folder is not whole and made from what ``content`` says; None if it is.

    A file of the size and time that the mark notes is taken for the one it was; any other is read.
    """
    marked = read_mark(folder, mark)
    if marked is None:
        return "it is not there"
    if any(marked.get(key) != value for key, value in json.loads(json.dumps(content)).items()):
        return "it was made from something else"
    for name, entry in marked["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if entry != _entry(file, entry.get("digest")) and file_digest(file) != entry.get("digest"):
            return f"{name} is damaged"
    return None


def obstacle(folder: Path, mark: str) -> str | None:
    """Why a folder may not be written or replaced; None if it may."""
    if folder.is_symlink():
        return f"{folder} is a symbolic link"
    if not folder.exists():
        return None
    if not folder.is_dir():
        return f"{folder} is a file"
    if not any(folder.iterdir()) or read_mark(folder, mark) is not None:
        return None
    return f"{folder} was written by something else (it has no {mark})"


@contextmanager
def growing(folder: Path) -> Iterator[Path]:
    """A new hidden folder beside ``folder``; gone after the context unless :func:`publish` named it."""
    partial = hidden_name(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, folder: Path, mark: str) -> None:
    """Gives a finished folder its name; an earlier one goes away only once the new one stands.

    The caller has asked :func:`obstacle`. What the earlier one's mark does not name moves into the new one.
    """
    for file in files_of(partial, mark):
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
    sync_folder(folder.parent)
    if old.exists():
        _carry(old, folder, mark)
        shutil.rmtree(old, ignore_errors=True)


def _carry(old: Path, new: Path, mark: str) -> None:
    marked = read_mark(old, mark)
    named = set(marked["files"]) if marked is not None else set()
    for file in files_of(old, mark):
        name = file.relative_to(old)
        if str(name) not in named and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            file.rename(new / name)


def files_of(folder: Path, mark: str) -> list[Path]:
    """Every file and link below a folder except the mark, in order; no link is followed."""
    files = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        files += [Path(root) / name for name in (*names, *links)]
    return sorted(file for file in files if file != folder / mark)


def _entry(file: Path, digest: str | None) -> dict[str, Any]:
    status = file.stat()
    return {"digest": digest, "size": status.st_size, "changed": status.st_mtime_ns}
