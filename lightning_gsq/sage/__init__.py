"""SAGE-PTQ (arXiv 2606.05429): few salient weights with several bits, signs for all others, counted honestly."""

from lightning_gsq.sage.budget import Menu
from lightning_gsq.sage.dual_mode import DualMode
from lightning_gsq.sage.graph import GraphOptions
from lightning_gsq.sage.quantizer import MixedQuantizer
from lightning_gsq.sage.settle import Choice, SettleOptions, settle
from lightning_gsq.sage.tensors import ElementTensor, MixedTensor, unpack_weight
from lightning_gsq.sage.unsettled import UnsettledQuantizer

__all__ = [
    "Choice",
    "DualMode",
    "ElementTensor",
    "GraphOptions",
    "Menu",
    "MixedQuantizer",
    "MixedTensor",
    "SettleOptions",
    "UnsettledQuantizer",
    "settle",
    "unpack_weight",
]
