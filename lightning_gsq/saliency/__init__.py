"""Which weights get more bits? SAGE-PTQ (arXiv 2606.05429): few salient weights, counted honestly.

choose      the salient part of each matrix of a block
scores      what makes a weight salient
threshold   the search of the salient ratio
budget      true bits spent on columns, bits and groups
graph       how many distinct scales a matrix needs
unsettled   a place for a quantizer whose salient part is not chosen yet
"""

from lightning_gsq.saliency.budget import Menu
from lightning_gsq.saliency.choose import Choice, SettleOptions, settle
from lightning_gsq.saliency.graph import GraphOptions

__all__ = ["Choice", "GraphOptions", "Menu", "SettleOptions", "settle"]
