"""How the learning rate falls over the steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_to_floor(optimizer: Optimizer, steps: float, floor: float) -> dict[str, object]:
    """Lightning's description of a cosine from the start to ``floor`` times the start, stepped with the optimizer.

    Args:
        optimizer: The optimizer.
        steps: Its steps in all; the rate stays at the floor after them.
        floor: Share of the start at the end, 0 to 1.
    """
    last = max(1, int(steps))
    schedule = LambdaLR(
        optimizer, lambda step: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / last, 1)))
    )
    return {"scheduler": schedule, "interval": "step"}
