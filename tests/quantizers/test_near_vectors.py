"""The candidates of code vectors: all that the grid holds, the present one first, none missing that is nearer."""

import itertools

import pytest
import torch

from lightning_gsq.quantizers.near_vectors import near_codes
from lightning_gsq.weights.presets import VECTOR_TYPES
from lightning_gsq.weights.vector_grid import codes_of_vectors
from tests.support.vectors import grid_named, random_codes

COUNT = 6


@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_candidates_are_different_codes_of_the_grid(name: str) -> None:
    grid = grid_named(name)
    codes_OI = random_codes(grid, 3, 256)
    position_OI = codes_OI + 6 * torch.randn(codes_OI.shape, generator=torch.Generator().manual_seed(1))
    near_LOI = near_codes(codes_OI, position_OI, grid, COUNT)
    assert near_LOI.shape == (COUNT, 3, 256) and near_LOI.dtype == codes_OI.dtype
    assert torch.equal(near_LOI[0], codes_OI)
    for one in near_LOI:
        grid.split(one)  # raises where it is none
    units = near_LOI.unflatten(-1, (-1, grid.unit))
    for one, other in itertools.combinations(units, 2):
        assert not bool((one == other).all(-1).any())
    error_LOU = (units - position_OI.unflatten(-1, (-1, grid.unit))).square().sum(-1)
    assert bool((error_LOU[1:].diff(dim=0) >= 0).all())
    if grid.vectors.shift_group == 32:
        shift = (near_LOI.long() + 4) % 8 - 4
        assert bool((shift == shift[0]).all())


@pytest.mark.parametrize("name", ["iq2_xxs", "iq3_s", "iq3_xxs", "iq1_m"])
def test_the_nearest_is_found(name: str) -> None:
    """Against all vectors with all signs that there are."""
    grid, generator = grid_named(name), torch.Generator().manual_seed(2)
    x_C = grid.high * torch.randn(grid.unit, generator=generator) / 2
    far = random_codes(grid, 1, 256)
    near_LC = near_codes(far, x_C.repeat(256 // grid.unit)[None], grid, 2)[1, 0, : grid.unit]
    codes_NC = codes_of_vectors(grid.vectors.name).float()
    if grid.vectors.shift_group:
        every = torch.cat([codes_NC - 1, codes_NC + 1])
        assert torch.equal(near_LC.float(), every[(every - x_C).square().sum(1).argmin()])
        return
    signs_SC = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=grid.unit)))
    if grid.vectors.signs == "even":
        signs_SC = signs_SC[signs_SC.prod(1) > 0]
    length = grid.vectors.length
    flipped_SC = x_C * signs_SC
    costs_S = torch.zeros(len(signs_SC))
    for half in flipped_SC.split(length, dim=1):
        costs_S += (half[:, None] - codes_NC).square().sum(-1).amin(1)
    # An even number of signs is made from the vectors that are nearest without it: not always the best one.
    slack = 1.2 if grid.vectors.signs == "even" else 1 + 1e-5
    assert float((near_LC - x_C).square().sum()) <= float(costs_S.min()) * slack
