"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_gsq.errors import ConfigurationError


def write_atomically(file: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all, also after a crash or a power cut."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigurationError(f"trainer.default_root_dir: cannot write {file}: {error.strerror}") from error
