"""Functions and modules in the place of a model's blocks, while its own code runs around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def standing_in(others: Mapping[int, Callable[..., Any]], originals: nn.ModuleList) -> Iterator[None]:
    """While active, a model that runs its own blocks runs others in their place: modules, or plain functions."""

    def forward_of(other: Callable[..., Any]) -> Any:
        return lambda *args, **kwargs: other(*args, **kwargs)

    try:
        for index, other in others.items():
            originals[index].__dict__["forward"] = forward_of(other)
        yield
    finally:
        for index in others:
            originals[index].__dict__.pop("forward", None)
