"""A finished run in memory, its weights staying packed, as its export in the native format would be.

Where that export is there, whole and of the run's present blocks, it is what gets loaded. Elsewhere it is written for
the moment into a temporary folder: the reader checks everything against files, and there is one reader.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.folders import MARK
from lightning_gsq.export.opening import open_run
from lightning_gsq.export.preflight import obstacles
from lightning_gsq.export.registry import format_of
from lightning_gsq.packed.load import load
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.system import owned_folders
from lightning_gsq.system.fingerprint import file_digest
from lightning_gsq.system.progress_bars import no_foreign_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NATIVE = "native"


def load_run(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a finished run; arguments as of :func:`lightning_gsq.load`.

    Raises:
        ConfigurationError: the run is not finished, its original is not there, no packed form holds its weights, or
            the temporary folder has no room.
    """
    if not RunFolder(folder, create=False).summary:
        raise ConfigurationError(
            f"model: the run in {folder} is not finished; resume it with the command that started it, then load it"
        )
    exported = folder / "export" / NATIVE
    if _is_of_run(exported, folder):
        return load(exported, dtype, device, trust_remote_code)
    format_, options = format_of(NATIVE), ExportOptions()
    with tempfile.TemporaryDirectory(prefix="lightning-gsq-", ignore_cleanup_errors=True) as temporary:
        root = Path(temporary)
        with no_foreign_bars():
            run = open_run(folder, trust_remote_code)
        reason = obstacles([format_], run, root, overwrite=False).get(NATIVE)
        if reason is not None:
            raise ConfigurationError(
                f"model: {folder} cannot be loaded with its weights packed: {reason}. "
                f"lightning_gsq.Quantized({str(folder)!r}).model is the same model with plain weights"
            )
        (root / NATIVE).mkdir()
        with no_foreign_bars():
            format_.write(format_.view(run, options), root / NATIVE, options)
        loaded = load(root / NATIVE, dtype, device, trust_remote_code)
    loaded.config._name_or_path = loaded.name_or_path = str(folder)
    return loaded


def _is_of_run(exported: Path, folder: Path) -> bool:
    """Whether an export is whole and made from the files that are the run's result now; reads no original for it."""
    mark = owned_folders.read_mark(exported, MARK) or {}
    made_from = mark.get("made_from")
    of = made_from.get("run") if isinstance(made_from, dict) else None
    if not isinstance(of, dict) or owned_folders.out_of_date(exported, MARK, {"format": NATIVE}) is not None:
        return False
    files = {folder / name: digest for name, digest in of.items() if name != "original"}
    kind = RunFolder(folder, create=False).progress.get("model") or "block"
    blocks = sorted((folder / "blocks").glob(f"{kind}-[0-9]*.safetensors"))
    return bool(blocks) and all(file.is_file() and files.get(file) == file_digest(file) for file in {*blocks, *files})
