"""Another function in the place of a library's own, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """Has a class's or module's function be another one inside the context.

    Args:
        owner: The class or module.
        name: The function's name in it.
        function: What is called instead.

    Raises:
        AttributeError: this version of the library has no such function.
    """
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)
