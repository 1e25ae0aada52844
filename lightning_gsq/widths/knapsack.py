"""The choice of least cost within a size: the multiple-choice knapsack, solved exactly.

Each item takes one of its options; the sum of sizes is bounded, the sum of costs is least. Branch and cut (HiGHS
through ``scipy.optimize.milp``) proves the optimum; a limit of nodes rather than of seconds keeps the answer the same
on every machine, and what is not proved by then is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

MAX_NODES = 20_000


@dataclass(frozen=True)
class Item:
    """One thing to choose for.

    Args:
        name: Its name.
        sizes: Bytes of each option, by the option's name.
        costs: What each costs.
    """

    name: str
    sizes: Mapping[str, int]
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    Args:
        options: The option of each item, by the item's name.
        size: Bytes of all.
        cost: Their cost.
        gap: By how much of that cost a better choice could be better at most; 0 where none is.
    """

    options: dict[str, str]
    size: int
    cost: float
    gap: float


def least(items: Sequence[Item]) -> int:
    """Bytes of the smallest options."""
    return sum(min(item.sizes.values()) for item in items)


def most(items: Sequence[Item]) -> int:
    """Bytes of the largest options."""
    return sum(max(item.sizes.values()) for item in items)


def pick(items: Sequence[Item], limit: int, floor: int = 0) -> Solution | None:
    """The options of least cost.

    Args:
        items: The items.
        limit: Bytes that all options may take together.
        floor: Bytes that they have to take at least.

    Returns:
        The options; None where none lie between ``floor`` and ``limit``.
    """
    if least(items) > limit or most(items) < floor:
        return None
    pairs = [(row, name) for row, item in enumerate(items) for name in item.sizes]
    sizes = np.array([items[row].sizes[name] for row, name in pairs], dtype=float)
    costs = np.array([items[row].costs[name] for row, name in pairs], dtype=float)
    scale = max(float(np.abs(costs).max()), 1e-300)
    unit = math.gcd(*(int(size) for size in sizes)) or 1
    rows = csr_matrix((np.ones(len(pairs)), ([row for row, _ in pairs], range(len(pairs)))))
    result = milp(
        costs / scale,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rows, 1, 1),
            LinearConstraint(sizes[None] / unit, math.ceil(floor / unit), limit // unit),
        ],
        options={"node_limit": MAX_NODES, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    taken = [(items[row], name) for (row, name), share in zip(pairs, result.x, strict=True) if share > 0.5]
    options = {item.name: name for item, name in taken}
    size = sum(item.sizes[name] for item, name in taken)
    if len(options) != len(items) or not floor <= size <= limit:  # within the solver's tolerance, not within the size
        return None
    cost = math.fsum(item.costs[name] for item, name in taken)
    return Solution(options, size, cost, float(result.mip_gap or 0.0))
