"""The exact choice within a size, compared with all of them."""

from __future__ import annotations

import itertools
import random

from lightning_gsq.widths.knapsack import Item, least, most, pick


def _items(count: int, seed: int) -> list[Item]:
    draw = random.Random(seed)
    return [
        Item(
            f"m{i}",
            {name: draw.randrange(10, 500) for name in "abc"[: draw.randrange(1, 4)]},
            dict.fromkeys("abc", 0.0) | {name: draw.lognormvariate(0, 2) for name in "abc"},
        )
        for i in range(count)
    ]


def _best(items: list[Item], limit: int, floor: int) -> float | None:
    costs = []
    for names in itertools.product(*(item.sizes for item in items)):
        size = sum(item.sizes[name] for item, name in zip(items, names, strict=True))
        if floor <= size <= limit:
            costs.append(sum(item.costs[name] for item, name in zip(items, names, strict=True)))
    return min(costs, default=None)


def test_no_choice_within_the_size_is_better() -> None:
    refused = 0
    for seed in range(30):
        items = _items(7, seed)
        for share in (0.0, 0.2, 0.5, 0.9):
            limit = round(least(items) + share * (most(items) - least(items)))
            for floor in (0, round(0.995 * limit)):
                found, best = pick(items, limit, floor), _best(items, limit, floor)
                if best is None:
                    assert found is None
                    refused += 1
                    continue
                assert found is not None and floor <= found.size <= limit
                assert abs(found.cost - best) <= 1e-9 * best
                assert found.size == sum(item.sizes[found.options[item.name]] for item in items)
    assert refused


def test_a_size_below_the_smallest_or_above_the_largest_options_has_none() -> None:
    items = _items(3, 1)
    assert pick(items, least(items) - 1) is None
    assert pick(items, 10**6, most(items) + 1) is None


def test_two_hundred_matrices_are_proved() -> None:
    draw = random.Random(0)
    sizes = [{b: (count * int(b)) // 8 for b in "2346"} for count in draw.choices((331_776, 110_592, 884_736), k=210)]
    items = [
        Item(f"{i}", own, {b: draw.lognormvariate(0, 1) * 4.0 ** -int(b) for b in own}) for i, own in enumerate(sizes)
    ]
    limit = (least(items) + most(items)) // 2
    found = pick(items, limit, int(0.995 * limit))
    assert found is not None and found.gap == 0 and 0.995 * limit <= found.size <= limit
