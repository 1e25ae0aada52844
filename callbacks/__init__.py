"""What watches or shapes a training: plug-ins, one a file, each working alone in any Trainer.

annealing       temperature and logit scale over the steps
monitor         levels, assignments and errors in TensorBoard
phase_progress  the end-to-end phase in the console
progress        the blocks in the console
rounding        every weight takes its most probable level
saliency        the salient part of each weight

A callback that only looks at a training and changes no result says ``watches_only = True``: a run may be resumed with
or without it. One that has nothing to do in the end-to-end phase says ``blocks_only = True``.
"""

from lightning_gsq.callbacks.annealing import GumbelAnnealing
from lightning_gsq.callbacks.monitor import QuantizationMonitor
from lightning_gsq.callbacks.phase_progress import EndToEndProgress
from lightning_gsq.callbacks.progress import BlockProgress
from lightning_gsq.callbacks.rounding import HardRounding, RoundingReport
from lightning_gsq.callbacks.saliency import SaliencyThreshold

__all__ = [
    "BlockProgress",
    "EndToEndProgress",
    "GumbelAnnealing",
    "HardRounding",
    "QuantizationMonitor",
    "RoundingReport",
    "SaliencyThreshold",
]
