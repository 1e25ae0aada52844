"""Memory that is freed, and memory that is given back."""

from __future__ import annotations

import ctypes
import gc
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
