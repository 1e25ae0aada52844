"""Can these formats be written at all? Asked before a run trains, and before the first folder is written."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import folders
from lightning_gsq.export.contract import ExportFormat
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.export.registry import format_of
from lightning_gsq.system.shards import SHARD_SIZE

MARGIN = 1.02
"""What names, alignment and tokenizers add to the numbers."""
SUGGESTED = (("native", "dequantized"), ("gguf", "compressed-tensors", "dequantized"))
"""Of each, the first format that takes a run is named to its user: one for PyTorch, one for other programs."""
COMPANIONS = 20_000_000
"""Bytes of configuration, tokenizer, card and figure, at most."""


def refuse_exports(chosen: Sequence[ExportFormat], run: PlannedRun, root: Path, reserved: int = 0) -> None:
    """Verifies, before a run trains, that all formats can be written into folders of ``root`` afterwards.

    Args:
        chosen: The formats.
        run: The run.
        root: The folder that holds one for each format; earlier exports there may be replaced.
        reserved: Bytes that will be written to the same disk before.

    Raises:
        ConfigurationError: some cannot; the message says of each why, and what can be done.
    """
    reasons = obstacles(chosen, run, root, overwrite=True, reserved=reserved)
    if reasons:
        raise ConfigurationError(describe(reasons))


def obstacles(
    chosen: Sequence[ExportFormat], run: PlannedRun, root: Path, overwrite: bool, reserved: int = 0
) -> dict[str, str]:
    """Which formats cannot be written, and why; see :func:`refuse_exports`."""
    reasons = {}
    free = _free_bytes(root) - reserved
    for format_ in chosen:
        folder = root / format_.name
        reason = folder_obstacle(folder, overwrite, inputs_of(run)) or model_obstacle(format_, run)
        needed = num_bytes(format_, run)
        # A file is written twice: see `system/shards.py`.
        if reason is None and needed + min(needed - COMPANIONS, SHARD_SIZE) > free:
            reason = f"{folder} takes about {needed / 1e9:.2f} GB, its disk has {max(free, 0) / 1e9:.2f} GB free"
        if reason is not None:
            reasons[format_.name] = reason
        else:
            free -= needed
    return reasons


def model_obstacle(format_: ExportFormat, run: PlannedRun) -> str | None:
    """Why a format cannot hold the run's model and weights."""
    return weights_obstacle(format_, run) or format_.refuse(format_.view(run))


def suggested_formats(run: PlannedRun) -> list[str]:
    """Names of one or two formats that take the run, for a command to copy."""
    taken = (next((n for n in names if model_obstacle(format_of(n), run) is None), None) for names in SUGGESTED)
    return [name for name in dict.fromkeys(taken) if name is not None]


def weights_obstacle(format_: ExportFormat, run: PlannedRun) -> str | None:
    """Why it cannot hold the weights, as far as schemes and shapes say; the model may be without weights."""
    if run.outside and not format_.outside:
        return (
            f"{format_.name} is a file of a text decoder, and {run.address} is a {run.config.model_type} model with "
            f"{', '.join(run.outside[:2])} outside of it; use native, dequantized or compressed-tensors, which hold all"
        )
    mixed = next((weight.name for weight in run.weights.values() if weight.scheme.mixed), None)
    if mixed is not None and not format_.salient:
        return f"{mixed} has salient weights of other bits, which {format_.name} cannot hold; use native or dequantized"
    return format_.refuse_weights(format_.view(run))


def folder_obstacle(folder: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> str | None:
    """Why a folder cannot be written, after leftovers of killed exports beside it are gone."""
    try:
        folders.tidy(folder)
        return folders.obstacle(folder, overwrite, inputs)
    except OSError as error:  # a name too long, a folder that cannot be read
        return f"{folder} cannot be used: {error.strerror or error}"


def inputs_of(run: PlannedRun) -> list[Path]:
    """Files and folders that an export reads: the original model, the file that the run started from."""
    source = run.model.address.source()
    paths = [Path(source.path), *source.files] if Path(source.path).exists() else []
    return paths + ([run.start_file] if run.start_file is not None else [])


def num_bytes(format_: ExportFormat, run: PlannedRun) -> int:
    """About what a folder takes on the disk."""
    run = format_.view(run)
    quantized = sum(weight.count * format_.stored_bits(weight, run) for weight in run.weights.values()) / 8
    others = sum(run.values[name].numel() for name in run.other_names())
    return int(MARGIN * (quantized + format_.other_bytes(run, others))) + COMPANIONS


def describe(reasons: Mapping[str, str]) -> str:
    """Reasons as the lines of an error."""
    if len(reasons) == 1:
        return "".join(f"format {name}: {reason}" for name, reason in reasons.items())
    return "formats that cannot be written:\n" + "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())


def _free_bytes(root: Path) -> int:
    try:
        above = next(parent for parent in (root.absolute(), *root.absolute().parents) if parent.exists())
        return shutil.disk_usage(above).free
    except OSError:  # a name too long: what is wrong with the folder is said where the folder is looked at
        return sys.maxsize
