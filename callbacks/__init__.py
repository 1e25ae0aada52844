"""Thin hooks around block training, one a file, each usable alone in any Lightning script."""

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
