"""Work in parts of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
