"""Memory that is freed and given back, and the most that was used."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys


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
