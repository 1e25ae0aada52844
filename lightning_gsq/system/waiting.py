"""Waiting for what another process leaves in a folder that both see."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Seen = TypeVar("Seen")


def wait_for(look: Callable[[], Seen | None], seconds: float, pause: float) -> Seen | None:
    """What a look finds that finds anything; None if none does for so long.

    Args:
        look: Looks once; None for nothing.
        seconds: How long to wait.
        pause: Between two looks, in seconds.
    """
    for _ in range(int(seconds / pause)):
        seen = look()
        if seen is not None:
            return seen
        time.sleep(pause)
    return None
