"""The short form of scripts/attack.py: a few cases of each kind, always the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.attack_cases import Case, bad_inputs, failures, kills, mutations
from tests.support.attack_targets import Target, make_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forks of a process with threads would wait for ones that they do not have
    try:
        return make_target(Path(tmp_path_factory.mktemp("attack")))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("attack", "first", "count"), [(kills, 0, 4), (failures, 0, 3), (mutations, 0, 150), (bad_inputs, 0, 12)]
)
def test_nothing_is_lost_and_nothing_is_shown_but_a_line(
    attack: Callable[[Target, int, int], Iterator[Case]], first: int, count: int, target: Target
) -> None:
    cases = list(attack(target, first, count))
    assert len(cases) == count
    assert [(name, outcome) for name, outcome, fine in cases if not fine] == []
