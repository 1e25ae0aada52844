"""How the learning rate rises and falls."""

from __future__ import annotations

import pytest
import torch

from lightning_gsq.training.schedule import cosine_to_floor


def _rates(steps: int, floor: float, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = cosine_to_floor(optimizer, steps, floor, warmup)["scheduler"]
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [*rates, scheduler.get_last_lr()[0]]


def test_the_rate_rises_in_even_parts_and_falls_to_the_floor() -> None:
    plain, rising = _rates(40, 0.1, 0), _rates(40, 0.1, 3)
    assert plain[0] == 1 and plain[-1] == pytest.approx(0.1)
    assert [a / b for a, b in zip(rising, plain, strict=True)] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 38)


def test_a_warm_up_takes_a_quarter_of_the_steps_at_most() -> None:
    plain = _rates(8, 0.0, 0)
    assert _rates(8, 0.0, 5)[:3] == pytest.approx([plain[0] / 3, plain[1] * 2 / 3, plain[2]])
    assert _rates(3, 0.0, 5) == _rates(3, 0.0, 0)
