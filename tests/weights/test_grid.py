from __future__ import annotations

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.grid import Bits, grid_of

ALL: tuple[Bits, ...] = (1, "ternary", 2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize("bits", ALL)
def test_every_code_survives_storing_and_fits_its_bits(bits: Bits) -> None:
    grid = grid_of(bits)
    codes = torch.tensor(grid.levels, dtype=torch.int8)
    stored = grid.store(codes)
    assert int(stored.min()) >= 0 and int(stored.max()) < 2**grid.storage_bits
    assert torch.equal(grid.restore(stored), codes)


@pytest.mark.parametrize("bits", ALL)
def test_the_nearest_code_is_the_nearest(bits: Bits) -> None:
    grid = grid_of(bits)
    position = torch.linspace(grid.low - 2, grid.high + 2, 997)
    levels = torch.tensor(grid.levels, dtype=torch.float32)
    best = (position[:, None] - levels).abs().amin(1)
    assert torch.equal((position - grid.nearest(position)).abs(), best)


def test_only_ternary_has_a_number_that_stands_for_no_code() -> None:
    assert [bits for bits in ALL if grid_of(bits).gaps] == ["ternary"]
    with pytest.raises(ValueError, match="below the lowest level -1"):
        grid_of("ternary").restore(torch.tensor([0]))


def test_candidates_and_logits() -> None:
    logits = {bits: grid_of(bits).candidates(2).logits for bits in ALL}
    assert logits == {1: 1, "ternary": 3, 2: 4, 3: 5, 4: 5, 5: 5, 6: 5, 7: 5, 8: 5}
    assert grid_of(3).candidates(1).levels == (-1, 0, 1) and grid_of(3).candidates(1).local


@pytest.mark.parametrize("bits", [0, 9, 1.5, "two", None, [2]])
def test_a_width_that_does_not_exist_is_refused(bits: object) -> None:
    with pytest.raises(ConfigurationError, match="bits must be 1 to 8 or 'ternary'"):
        grid_of(bits)  # type: ignore[arg-type]
