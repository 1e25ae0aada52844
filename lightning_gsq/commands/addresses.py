"""What other verbs wrote, as an address of a model."""

from __future__ import annotations

from pathlib import Path

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.folders import MARK
from lightning_gsq.models import loading
from lightning_gsq.run import saving
from lightning_gsq.system.owned_folders import read_mark


def written_model(address: str) -> str:
    """The model in a finished run folder or in an exported one; any other address as it is.

    Raises:
        ConfigurationError: a run without a finished model, or a folder of several GGUF files.
    """
    folder = Path(address).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return address
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ConfigurationError(
            f"model.pretrained: {folder} holds {len(files)} GGUF files; give one of them, such as {files[0]}"
        )
    return str(files[0]) if files else loading.finished_model(address)


def is_written_here(address: str) -> bool:
    """Whether an address is weights that a run or an export wrote: quantized, and back in plain numbers."""
    path = Path(address).expanduser()
    folder = path if path.is_dir() else path.parent
    return any(read_mark(folder, mark) is not None for mark in (saving.MARK, MARK))


def run_of(address: str) -> tuple[Path, str | None] | None:
    """The run folder that a model belongs to, and the format if it is an export inside of it; None for other models."""
    path = Path(address).expanduser()
    folder = path if path.is_dir() else path.parent
    if (folder / "recipe.yaml").is_file() and (folder / "summary.json").is_file():
        return folder, None
    mark = read_mark(folder, MARK)
    run = folder.parent.parent
    if mark is None or folder.parent.name != "export" or not (run / "summary.json").is_file():
        return None
    return run, str(mark["format"])
