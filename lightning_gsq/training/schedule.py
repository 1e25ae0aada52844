"""How the learning rate falls over the steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP_SHARE = 0.25
"""Share of all steps that a warm-up takes at most."""


def cosine_to_floor(optimizer: Optimizer, steps: float, floor: float, warmup: int = 0) -> dict[str, object]:
    """Lightning's description of a cosine from the start to ``floor`` times the start, stepped with the optimizer.

    Args:
        optimizer: The optimizer.
        steps: Its steps in all; the rate stays at the floor after them.
        floor: Share of the start at the end, 0 to 1.
        warmup: Steps in which the rate rises to the cosine, in even parts from the first one on; at most
            :data:`WARMUP_SHARE` of all.
    """
    last = max(1, int(steps))
    rising = min(warmup, int(WARMUP_SHARE * last))

    def share(step: int) -> float:
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / last, 1)))
        return cosine * min(1.0, (step + 1) / (rising + 1))

    return {"scheduler": LambdaLR(optimizer, share), "interval": "step"}
