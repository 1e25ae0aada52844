"""What of a plan does not fit the machine, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate import limits
from lightning_gsq.estimate.phases import Phase
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
    if streams > activations.memory_limit_gb * 1e9:
        limits.refuse(disk_problems(streams, activations))
    elif streams > (room := limits.host_bytes()):
        limits.refuse([stream_problem(streams, room, activations)])


def memory_problems(phases: Sequence[Phase], on_host: bool, host_room: int, device_room: int | None) -> list[str]:
    """The phase that takes most of the host, and of the device, where there is less."""
    problems = []
    worst = max(phases, key=lambda phase: phase.needed(on_host))
    if (needed := worst.needed(on_host)) > host_room:
        problems.append(
            f"host memory: {gigabytes(needed)} are needed ({worst.name}), {gigabytes(host_room)} are available"
        )
    worst = max(phases, key=lambda phase: phase.total(on_host)[1])
    if device_room is not None and (needed := worst.total(on_host)[1]) > device_room:
        problems.append(
            f"device memory: {gigabytes(needed)} are needed ({worst.name}), {gigabytes(device_room)} are free"
        )
    return problems


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
