"""Progress bars of other packages, which this project's own lines would drown in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tqdm.std


@contextmanager
def no_foreign_bars() -> Iterator[None]:
    """Inside the context every new tqdm bar is silent, whichever package makes it and whatever its settings say."""
    original = tqdm.std.tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    tqdm.std.tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.std.tqdm.__init__ = original
