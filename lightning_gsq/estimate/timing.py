"""Seconds of something on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

STEPS = 3


def once(action: Callable[[int], object], device: torch.device, number: int = 0) -> float:
    """Seconds of one call, with the call's number; what a GPU still has to do before it is not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    action(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def median_seconds(action: Callable[[int], object], device: torch.device, repeats: int = STEPS) -> float:
    """Median seconds after one call that is not counted: it compiles, allocates, and fills caches."""
    return statistics.median([once(action, device, number) for number in range(repeats + 1)][1:])
