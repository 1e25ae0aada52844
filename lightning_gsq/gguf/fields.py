"""Key-values of a GGUF file, made from Python's numbers and texts."""

from __future__ import annotations

from collections.abc import Sequence

from gguf import GGUFValueType

from lightning_gsq.gguf.file import Field


def uint(value: int) -> Field:
    """A whole number in 32 bits."""
    return Field(int(value), GGUFValueType.UINT32)


def real(value: float) -> Field:
    """An fp32 number."""
    return Field(float(value), GGUFValueType.FLOAT32)


def flag(value: bool) -> Field:
    """A truth value."""
    return Field(bool(value), GGUFValueType.BOOL)


def text(value: str) -> Field:
    """A text."""
    return Field(value, GGUFValueType.STRING)


def array(values: Sequence[object], element: GGUFValueType) -> Field:
    """A list, with the type of its elements."""
    return Field(list(values), GGUFValueType.ARRAY, element)
