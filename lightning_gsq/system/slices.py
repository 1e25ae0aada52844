"""Work in parts of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def slices_within(sizes: Sequence[int], limit: float) -> list[slice]:
    """Consecutive slices whose sizes add up to at most ``limit``; what is larger by itself has one of its own."""
    parts: list[slice] = []
    start, sum_ = 0, 0
    for index, size in enumerate(sizes):
        if index > start and sum_ + size > limit:
            parts.append(slice(start, index))
            start, sum_ = index, 0
        sum_ += size
    return [*parts, slice(start, len(sizes))] if sizes else []
