"""What of a plan does not fit disks, and the memory that hidden states are kept in, in words."""

from __future__ import annotations

from pathlib import Path

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate import limits
from lightning_gsq.estimate.quantities import num_streams, stream_bytes
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.training import ModelQuantization


def refuse_early(
    model: ModelQuantization,
    data: CalibrationDataModule,
    activations: ActivationOptions,
    width: int,
) -> None:
    """The cheap part of the checks, for ``fit``: hidden states in memory or on disk, beside the loaded model.

    Raises:
        ConfigurationError: they do not fit.
    """
    if "blocks" not in model.phases:
        return
    streams = num_streams(model) * stream_bytes(data, activations, width)
    if streams > activations.limit:
        limits.refuse(disk_problems(streams, activations))
    elif streams > (room := limits.host_bytes()):
        limits.refuse([stream_problem(streams, room, activations)])


def stream_problem(streams: int, room: int, activations: ActivationOptions) -> str:
    """Hidden states are larger than the memory they would be kept in."""
    return (
        f"activations.memory_limit_gb: hidden states of {gigabytes(streams)} would be kept in memory, of which "
        f"{gigabytes(room)} are available; lower the limit, so that they live in files, or use "
        f"{_smaller(activations)}"
    )


def disk_problems(streams: int, activations: ActivationOptions) -> list[str]:
    """Hidden states are larger than what their disk has free."""
    free = limits.free_disk(activations.folder)
    if streams <= free:
        return []
    return [
        f"activations.folder: hidden states take {gigabytes(streams)}, the disk of "
        f"{activations.folder or 'the temporary folder'} has {gigabytes(free)} free; choose another folder, "
        f"{_smaller(activations)}"
    ]


def _smaller(activations: ActivationOptions) -> str:
    """What makes hidden states smaller, and is not asked for yet."""
    return ("--activations.dtype bfloat16 or " if activations.dtype == "float32" else "") + "fewer sequences"


def folder_problems(needed: int, folder: Path) -> list[str]:
    """The run folder is larger than what its disk has free."""
    free = limits.free_disk(folder)
    if needed <= free:
        return []
    return [
        f"trainer.default_root_dir: the run folder takes {gigabytes(needed)}, the disk of {folder} has "
        f"{gigabytes(free)} free"
    ]


def gigabytes(count: float) -> str:
    """A size for people."""
    return f"{count / 1e9:,.1f} GB"
