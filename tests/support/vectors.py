"""Random code vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.weights.presets import VECTOR_TYPES
from lightning_gsq.weights.vector_grid import VectorGrid


def grid_named(name: str) -> VectorGrid:
    """The grid of a preset."""
    grid = VECTOR_TYPES[name].grid
    assert isinstance(grid, VectorGrid)
    return grid


def random_codes(grid: VectorGrid, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Codes that the grid holds, int8."""
    generator, own = torch.Generator().manual_seed(seed), grid.vectors
    index = torch.randint(0, own.count, (rows, columns // own.length), generator=generator, dtype=torch.int16)
    if own.shift_group:
        return grid.join(index, torch.rand(rows, columns // own.shift_group, generator=generator) < 0.5)
    negative = torch.rand(rows, columns // 8, 8, generator=generator) < 0.5
    if own.signs == "even":
        negative[..., 7] ^= negative.sum(-1) % 2 == 1
    return grid.join(index, negative.flatten(-2))
