"""What a run says of matrices that few tokens reached."""

import torch

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import InputStatistics
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.matrices import rarely_reached
from lightning_gsq.weights.scheme import QuantScheme

DENSE = LinearSite("up.weight", 0, 8, 16, False)
EXPERTS = LinearSite("experts", 3, 8, 16, False)


def see(statistics: InputStatistics, name: str, expert: int, count: int) -> None:
    """A matrix sees some tokens."""
    x_NI = torch.randn(count, 16)
    statistics._add((name, expert), x_NI, x_NI)


def test_experts_with_few_tokens_and_with_none() -> None:
    statistics = InputStatistics([DENSE, EXPERTS], torch.device("cpu"))
    plan = BlockPlan(4, "model.layers.4", {site: QuantScheme(3, 16) for site in (DENSE, EXPERTS)})
    for name, expert, count in (("up.weight", 0, 40), ("experts", 0, 16), ("experts", 1, 5)):
        see(statistics, name, expert, count)
    assert statistics.tokens(EXPERTS) == [16, 5, 0]
    line = rarely_reached(statistics, plan)
    assert line is not None and line.startswith(
        "model.layers.4: 2 of 4 matrices saw fewer calibration tokens than they have columns (the fewest 0); 1 of them"
    )
    see(statistics, "experts", 1, 11)
    see(statistics, "experts", 2, 16)
    assert rarely_reached(statistics, plan) is None
