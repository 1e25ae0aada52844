"""What a run leaves of the divergence that plain rounding makes."""

from __future__ import annotations

import pytest

from lightning_gsq.commands.sizing import makes_up
from lightning_gsq.quantizers import GPTQ, RTN, LeastSquares, LlamaCpp, WarmStart
from lightning_gsq.training import ModelQuantization
from lightning_gsq.widths import at_the_end

CHOICES = ["w2g64", "w4g64"]


def test_blocks_are_made_up_for_and_what_lies_outside_is_not() -> None:
    worth = {name: {"w2g64": 1.0, "w4g64": 0.1} for name in ("model.layers.0.a", "model.embed_tokens", "lm_head")}
    end = at_the_end(worth, "model.layers")
    assert end["model.embed_tokens"] == end["lm_head"] == worth["lm_head"]
    inside = end["model.layers.0.a"]
    assert inside["w2g64"] < 0.7 and inside["w2g64"] / inside["w4g64"] == pytest.approx(10)


@pytest.mark.parametrize(
    ("start", "expected"), [(RTN(), False), (LlamaCpp(), False), (GPTQ(), True), (LeastSquares(), True)]
)
def test_what_makes_up_for_rounding(start: WarmStart, expected: bool) -> None:
    model = ModelQuantization("x", size="80MB", choices=CHOICES, warm_start=start)
    assert makes_up(model) is expected
