"""Work in parts of a bounded size."""

from __future__ import annotations

from lightning_gsq.system.slices import slices, slices_within


def test_slices_cover_everything_once() -> None:
    assert list(slices(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert not list(slices(0, 2))


def test_neighbours_go_together_as_far_as_they_fit() -> None:
    assert slices_within([3, 4, 5, 1, 9, 1], 7) == [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6)]
    assert slices_within([3, 4], 7) == [slice(0, 2)]
    assert slices_within([3, 4], 0) == [slice(0, 1), slice(1, 2)]
    assert slices_within([], 7) == []
