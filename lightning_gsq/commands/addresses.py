"""What other verbs wrote, as an address of a model."""

from __future__ import annotations

from pathlib import Path

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading


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
