"""What ``plan`` says of a warm start: every shape is tried, large ones in part; a batch is watched as the run does."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from lightning_gsq.estimate import start_probe
from lightning_gsq.estimate.probe import random_block
from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.simulate import longer
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import RTN, LeastSquares, WarmStart
from lightning_gsq.quantizers.following import PairedStatistics
from lightning_gsq.quantizers.statistics import InputStatistics
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme
from tests.estimate.test_experts import skeleton_of

CPU = torch.device("cpu")
SCHEME = QuantScheme(bits=3, group_size=16)


def model_with(start: WarmStart) -> ModelQuantization:
    return ModelQuantization(pretrained="here", warm_start=start, scheme=SCHEME)


def seconds(rows: int, columns: int) -> float:
    """An exact cost: what the columns take among each other, and every row."""
    return columns**3 + 5.0 * rows * columns**2


def test_matrices_of_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger than what is tried, too; equal ones and those of experts are tried once and counted each."""
    tried: list[tuple[int, int]] = []

    def cost(model: object, site: object, scheme: object, shape: tuple[int, int], device: object) -> float:
        tried.append(shape)
        return seconds(*shape)

    monkeypatch.setattr(start_probe, "_seconds", cost)
    monkeypatch.setattr(start_probe, "COLUMNS", 64)
    monkeypatch.setattr(start_probe, "WEIGHTS", 64 * 32)
    shapes = {"q": (0, 48, 32), "k": (0, 16, 32), "v": (0, 16, 32), "down": (0, 32, 256), "experts": (7, 100, 32)}
    weights: Weights = {LinearSite(name, *shape, transposed=False): SCHEME for name, shape in shapes.items()}
    total = sum(max(experts, 1) * seconds(rows, columns) for experts, rows, columns in shapes.values())
    assert start_probe.rounding(model_with(LeastSquares()), weights, CPU) == pytest.approx(total)
    assert max(rows * columns for rows, columns in tried) <= start_probe.WEIGHTS
    assert tried.count((16, 32)) == 2  # the smallest once more, before anything is counted


@pytest.mark.parametrize(
    ("start", "paired", "alone"),
    [(LeastSquares(), 7, 0), (LeastSquares(follow=False), 0, 7), (RTN(), 0, 7), (RTN(weighted=False), None, None)],
)
def test_a_batch_is_watched(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, start: WarmStart, paired: int | None, alone: int | None
) -> None:
    """Every weight of the block once: paired with the full-precision model where the start follows it."""
    counts = {"paired": 0, "alone": 0}
    add, see = PairedStatistics.add, InputStatistics._add

    def adding(self: PairedStatistics, *recordings: object) -> None:
        counts["paired"] += len(self.sites)
        counts["alone"] -= len(self.sites)  # which it has statistics of their own for
        add(self, *recordings)  # type: ignore[arg-type]

    def seeing(self: InputStatistics, *seen: object) -> None:
        counts["alone"] += 1
        see(self, *seen)  # type: ignore[arg-type]

    monkeypatch.setattr(PairedStatistics, "add", adding)
    monkeypatch.setattr(InputStatistics, "_add", seeing)
    skeleton = skeleton_of(tiny_llama)
    own = skeleton.blocks[0]
    block, hidden_BTD = random_block(own, CPU), torch.randn(2, 24, skeleton.width)
    weights: Weights = dict.fromkeys(own.sites, SCHEME)
    precision = contextlib.nullcontext()
    watch = start_probe.watching(model_with(start), block, weights, hidden_BTD, longer(own.call, 24), precision)
    assert (watch is None) == (paired is None)
    if watch is not None:
        watch(0)
        assert counts == {"paired": paired, "alone": alone}
