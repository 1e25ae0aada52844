"""One process at a time in a folder. A lock goes with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lightning_gsq.errors import ConfigurationError

BUSY = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}

try:
    import fcntl

    def _lock(stream: IO[str]) -> None:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _wait(stream: IO[str]) -> None:
        fcntl.flock(stream, fcntl.LOCK_EX)

except ImportError:  # Windows
    import msvcrt

    def _lock(stream: IO[str]) -> None:
        stream.seek(1 << 20)  # far behind the text, which others read meanwhile
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        stream.seek(0)

    def _wait(stream: IO[str]) -> None:
        stream.seek(1 << 20)
        msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
        stream.seek(0)


@contextmanager
def waiting_for(file: Path) -> Iterator[None]:
    """Holds the lock of a file, after other processes that hold it; without one on file systems that have none."""
    with file.open("a+", encoding="utf-8") as stream:
        with suppress(OSError):
            _wait(stream)
        yield


@contextmanager
def locked(file: Path, text: str, option: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a file, which stays.

    Args:
        file: The file; made if it is not there.
        text: Its first line. The second says which process has the lock.
        option: The option that names its folder, for the message.
        say: Prints a line where the file system has no locks.

    Raises:
        ConfigurationError: another process has it, or the file cannot be written.
    """
    try:
        stream = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{option}: cannot write {file}: {error.strerror}") from error
    with stream:
        try:
            _lock(stream)
        except OSError as error:
            if error.errno in BUSY:
                raise ConfigurationError(
                    f"{option}: {_holder(file)} is working in {file.parent}; wait until it has ended, or use another "
                    "folder"
                ) from error
            say(f"{file.parent} cannot be locked ({error.strerror}): start no second process in it")
        stream.seek(0)
        stream.truncate()
        stream.write(f"{text}\nprocess {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def is_free(file: Path) -> bool:
    """Whether nobody holds the lock of a file; False where there is no such file."""
    try:
        with file.open("r+", encoding="utf-8") as stream:
            _lock(stream)
    except OSError:
        return False
    return True


def _holder(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[1] if len(lines) > 1 else "another process"
