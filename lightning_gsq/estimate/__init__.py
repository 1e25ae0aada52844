"""What a run will take, before it starts: sizes, bits, memory, disk, steps and time, from a configuration alone."""

from lightning_gsq.estimate.estimate import Estimate, estimate, refuse_early
from lightning_gsq.estimate.show import print_estimate

__all__ = ["Estimate", "estimate", "print_estimate", "refuse_early"]
