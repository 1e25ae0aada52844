"""Files that are there whole or not at all, and what a writer that was killed left of one."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from lightning_gsq.errors import ConfigurationError

LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{8}|\d+)\.(?P<stage>partial|old)")
"""Hidden names: what grows until it gets its own name, and what has just lost it."""


def hidden_name(path: Path, stage: str = "partial") -> Path:
    """A name beside ``path`` that nothing else has, and that :func:`tidy` knows."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{stage}")


def write_atomically(file: Path, content: bytes, option: str = "trainer.default_root_dir") -> None:
    """Writes a file so that it is there whole or not at all, also after a crash or a power cut.

    Args:
        file: The file; its folder is made if it is not there.
        content: All of it.
        option: The option that says where it goes, for the message.

    Raises:
        ConfigurationError: it cannot be written.
    """
    partial = hidden_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ConfigurationError(f"{option}: cannot write {file}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems that cannot do this do it by themselves
            os.fsync(handle)
    finally:
        os.close(handle)


def tidy(folder: Path) -> None:
    """Cleans up what killed writers left in a folder that no other process writes to.

    What had just lost its name gets it back where nothing took it.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):  # an .old folder comes before its .partial one
        leftover = LEFTOVER.fullmatch(path.name)
        if leftover is None:
            continue
        named = path.with_name(leftover["name"])
        if leftover["stage"] == "old" and not named.exists() and not named.is_symlink():
            path.rename(named)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
