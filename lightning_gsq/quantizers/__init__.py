"""Quantizers: warm starts, and the Gumbel quantizer that trains from them."""

from lightning_gsq.quantizers.dual_mode import DualMode
from lightning_gsq.quantizers.from_file import FromFile
from lightning_gsq.quantizers.gumbel import GumbelOptions, GumbelQuantizer
from lightning_gsq.quantizers.statistics import InputStatistics
from lightning_gsq.quantizers.warm_start import GPTQ, RTN, Matrix, Start, WarmStart

__all__ = [
    "GPTQ",
    "RTN",
    "DualMode",
    "FromFile",
    "GumbelOptions",
    "GumbelQuantizer",
    "InputStatistics",
    "Matrix",
    "Start",
    "WarmStart",
]
