"""Which width does each matrix get? One size in, mixed widths out.

size        80MB or 2.6bpw as bytes
groups      matrices that take their width together, and what they may take
worth       what a matrix loses by each choice, predicted from one gradient a sequence
smoothing   noise taken out of these predictions
outcome     what a run leaves of what rounding costs
rounding    the change that a choice makes
ends        the same for the embedding and the head
knapsack    the best choice within a size, exactly
picture     widths over depth, and where the bytes go
choice      the widths of a whole model, as a file that can be edited and given back
"""

from lightning_gsq.widths.choice import Choice
from lightning_gsq.widths.groups import Group, make_groups
from lightning_gsq.widths.knapsack import Item, Solution, pick
from lightning_gsq.widths.outcome import at_the_end
from lightning_gsq.widths.size import Size
from lightning_gsq.widths.smoothing import smoothed
from lightning_gsq.widths.worth import Worth, measure_worth

__all__ = [
    "Choice",
    "Group",
    "Item",
    "Size",
    "Solution",
    "Worth",
    "at_the_end",
    "make_groups",
    "measure_worth",
    "pick",
    "smoothed",
]
