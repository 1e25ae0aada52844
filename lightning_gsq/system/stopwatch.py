"""Where the time of a block goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds of named parts of the work. A part inside another one is counted once, as itself.

    Example::

        watch = Stopwatch()
        with watch("training"):
            ...
            with watch("saliency"):  # not counted as training
                ...
        watch.seconds  # {"training": 12.1, "saliency": 0.4}

    Work that an accelerator still has to do when a part ends counts towards the part that waits for it.

    Args:
        clock: Seconds since some moment.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.seconds = clock, dict[str, float]()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts what happens inside towards ``part``."""
        self._count()
        self._open.append(part)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """The seconds so far, which are then forgotten."""
        taken, self.seconds = self.seconds, {}
        return taken

    def _count(self) -> None:
        now = self.clock()
        if self._open:
            part = self._open[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


def duration(seconds: float) -> str:
    """A time for people, as exact as an estimate is."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
