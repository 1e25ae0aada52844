"""Noise in the predictions, and what is no noise."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gsq.widths import Worth, smoothed

CHOICES = {"w2g64": 1.0, "w3g64": 0.3, "w4g64": 0.08, "w6g64": 0.006}
SAMPLES = 64


def _true(depth: int = 24) -> Worth:
    factors = np.exp(np.random.default_rng(0).normal(0, 0.7, (depth, 2)))
    return {
        f"h.{index}.{kind}.weight": {name: float(cost * factors[index, number]) for name, cost in CHOICES.items()}
        for index in range(depth)
        for number, kind in enumerate(("up", "down"))
    }


def _noisy(true: Worth) -> Worth:
    draw = np.random.default_rng(1)
    return {
        name: {choice: cost * float(draw.chisquare(SAMPLES)) / SAMPLES for choice, cost in costs.items()}
        for name, costs in true.items()
    }


def _error(worth: Worth, true: Worth) -> float:
    logs = [np.log(worth[name][choice] / cost) for name, costs in true.items() for choice, cost in costs.items()]
    return float(np.std(logs))


def test_noise_is_taken_out() -> None:
    true = _true()
    noisy = _noisy(true)
    assert _error(noisy, true) > 0.15
    assert _error(smoothed(noisy, "h", SAMPLES), true) < 0.75 * _error(noisy, true)


def test_what_is_larger_than_noise_stays() -> None:
    true = _true()
    for index in range(0, 24, 2):
        true[f"h.{index}.down.weight"]["w2g64"] *= 20.0
    noisy = _noisy(true)
    found = smoothed(noisy, "h", SAMPLES)
    for index in range(24):
        name = f"h.{index}.down.weight"
        assert found[name]["w2g64"] == pytest.approx(noisy[name]["w2g64"], rel=0.1)


def test_what_stands_alone_or_is_worth_nothing_stays() -> None:
    worth = {**_noisy(_true()), "wte.weight": dict(CHOICES), "h.0.router.weight": {"w4g64": 0.1}}
    worth["h.3.up.weight"] = dict.fromkeys(CHOICES, 0.0)
    found = smoothed(worth, "h", SAMPLES)
    assert list(found) == list(worth)
    assert found["wte.weight"] == pytest.approx(CHOICES)
    assert found["h.0.router.weight"] == pytest.approx({"w4g64": 0.1})
    assert found["h.3.up.weight"] == worth["h.3.up.weight"]
