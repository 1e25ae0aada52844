"""What there is: memory of the host and the device, room on disks; and the check whether something fits."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.memory import host_bytes

__all__ = ["device_bytes", "free_disk", "host_bytes", "own_bytes", "refuse"]


def own_bytes() -> int:
    """What this process takes now."""
    return int(psutil.Process().memory_info().rss)


def device_bytes(device: torch.device) -> int | None:
    """Memory of an accelerator that this process may take; None if the device is the host or does not say."""
    if device.type == "cuda" and torch.cuda.is_available():
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reusable
    return None


def free_disk(folder: str | Path | None) -> int:
    """Free bytes on the disk of a folder that may not exist yet; None for the system's temporary folder."""
    path = Path(folder or tempfile.gettempdir()).expanduser().resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def refuse(problems: Iterable[str]) -> None:
    """Raises one error for all problems, if there are any.

    Raises:
        ConfigurationError: something does not fit.
    """
    lines = list(problems)
    if lines:
        raise ConfigurationError("this run does not fit:\n" + "\n".join(f"  {line}" for line in lines))
