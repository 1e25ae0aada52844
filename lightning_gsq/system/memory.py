"""Memory that is freed and given back, what there is, and the most that was used."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import psutil


def release() -> None:
    """Gives freed memory back to the system.

    Collects cycles (a Trainer and its module refer to each other), and asks glibc to return the free part of its heap:
    after a phase of many small and large tensors that is some hundred megabytes which the next phase cannot use.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)


def peak_memory_bytes() -> int:
    """The most resident memory this process has used, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_bytes() -> int:
    """What a new process may take: available memory, within the limit of a container."""
    available = int(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (maximum := limit.read_text().strip()).isdigit():
        cached = _inactive(Path("/sys/fs/cgroup/memory.stat"))
        available = min(available, int(maximum) - int(used.read_text()) + cached)
    return available


def _inactive(statistics: Path) -> int:
    """Cache that the container gives back when asked for memory."""
    if not statistics.is_file():
        return 0
    fields = dict(line.split() for line in statistics.read_text().splitlines())
    return int(fields.get("inactive_file", 0))
