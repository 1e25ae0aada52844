"""What the blocks of all types have in common: fp16 scales as bytes, and small whole numbers that are checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_gsq.gguf.types.table import GgmlType


def fp16_tensor(data: np.ndarray) -> Tensor:
    """fp16 ``O B`` of bytes ``O B 2``, with the bits of a NaN as they are."""
    return torch.from_numpy(data.view("<i2")[..., 0].astype(np.int16)).view(torch.float16)


def fp16_bytes(name: str, value: Tensor | None, rows: int, count: int) -> np.ndarray:
    """Inverse of :func:`fp16_tensor`.

    Raises:
        ValueError: it is no fp16 tensor of ``rows`` and ``count`` columns.
    """
    if value is None or value.dtype != torch.float16 or tuple(value.shape) != (rows, count):
        raise ValueError(f"{name} has to be float16 of shape {(rows, count)}, got {_described(value)}")
    bits: np.ndarray = value.detach().cpu().contiguous().view(torch.int16).numpy().astype("<i2")
    return bits[..., None].view(np.uint8)


def whole_blocks(kind: GgmlType, columns: int) -> int:
    """Blocks of a row.

    Raises:
        ValueError: the row is no whole blocks.
    """
    if columns % kind.length or not columns:
        raise ValueError(f"{kind.name} holds rows of whole blocks of {kind.length} weights, got {columns}")
    return columns // kind.length


def whole_numbers(
    name: str, value: Tensor | None, limits: Sequence[int], shape: tuple[int, int], count: int
) -> np.ndarray:
    """int16 ``O B n`` of whole numbers ``O B*n``.

    Args:
        name: What they are, for the message.
        value: Any type of integers, or bools.
        limits: The smallest and the largest.
        shape: What they have to have.
        count: Blocks of a row.

    Raises:
        ValueError: they are something else.
    """
    if value is None or value.is_floating_point() or tuple(value.shape) != shape:
        raise ValueError(f"{name} has to be whole numbers of shape {shape}, got {_described(value)}")
    numbers = value.detach().cpu().numpy()
    if numbers.size and (numbers.min() < limits[0] or numbers.max() > limits[1]):
        raise ValueError(f"{name} has to lie in {limits[0]} ... {limits[1]}, got {numbers.min()} ... {numbers.max()}")
    return numbers.astype(np.int16).reshape(shape[0], count, shape[1] // count)


def _described(value: Tensor | None) -> str:
    return "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
