"""Float to codes? Warm starts, and the Gumbel quantizer that trains from them.

warm_start     what a warm start gets and gives
scale_search   the scale of a group, and its offset
layout_fit     scales as a layout stores them, found from left to right
rtn            round to nearest
gptq           column by column, with error feedback
least_squares  codes and scales in turn, each the best for the others
sweeps         how they take turns, and which code vectors are the best
dual_mode      least-squares scales; the published quantizer of the element layout
from_file      codes and scales of a GGUF file
llama_cpp      codes and scales that llama.cpp's own quantizers find
trained_scales scales that train as they are stored
gumbel         a trainable choice of levels
vector_gumbel  a trainable choice of code vectors
near_vectors   which of these are near
salient_start  warm start of a matrix with salient columns
salient        both parts of such a matrix as trainable choices
statistics     second moments of the inputs of linear weights
following      weights that make up for what is off already where they are
"""

from lightning_gsq.quantizers.dual_mode import DualMode
from lightning_gsq.quantizers.from_file import FromFile
from lightning_gsq.quantizers.gptq import GPTQ
from lightning_gsq.quantizers.gumbel import GumbelOptions, GumbelQuantizer
from lightning_gsq.quantizers.least_squares import LeastSquares
from lightning_gsq.quantizers.llama_cpp import LlamaCpp
from lightning_gsq.quantizers.rtn import RTN
from lightning_gsq.quantizers.statistics import InputStatistics
from lightning_gsq.quantizers.warm_start import Matrix, Start, WarmStart

__all__ = [
    "GPTQ",
    "RTN",
    "DualMode",
    "FromFile",
    "GumbelOptions",
    "GumbelQuantizer",
    "InputStatistics",
    "LeastSquares",
    "LlamaCpp",
    "Matrix",
    "Start",
    "WarmStart",
]
