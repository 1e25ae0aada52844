"""Loading what the project wrote: :func:`load` takes an export in the native format, or a finished run itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_gsq.packed import load as native

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load"]


def load(
    folder: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model with packed weights, in evaluation mode.

    A run folder gives the same model as its native export, which is loaded where it is there and current. Elsewhere the
    packed files are written into a temporary folder (``TMPDIR``) each time, which takes room for them, and the original
    model, whose other weights they hold: ``export RUN --format native`` spares both. The run's plain weights are
    ``lightning_gsq.Quantized(folder).model``.

    Args:
        folder: A folder in the native format, or the folder of a finished run.
        dtype: Dtype of what is not quantized, and of the arithmetic; "auto" for that of the file.
        device: Where to put it; the CPU by default.
        trust_remote_code: Run Python code that comes with the folder, or with the run's original.

    Raises:
        ConfigurationError: it is neither, a damaged one, or a run that is not finished or that no packed form holds.
    """
    root = Path(folder).expanduser()
    if (root / "recipe.yaml").is_file() and not (root / "config.json").is_file() and not any(root.glob("*.gguf")):
        from lightning_gsq.export.packed_run import load_run  # takes seconds, which a native folder does not wait for

        return load_run(root, dtype, device, trust_remote_code)
    return native.load(root, dtype, device, trust_remote_code)
