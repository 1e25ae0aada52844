"""What is left, at the end of a run, of the divergence that plain rounding of a matrix would have made.

Predictions are those of plain rounding (:mod:`lightning_gsq.widths.worth`). In the blocks a start by least squares then
takes away about half; embedding and head stay as they were rounded. So what these cost weighs more in the end than it
does at the beginning (measured in docs/size.md).
"""

from __future__ import annotations

from lightning_gsq.widths.worth import Worth

LEFT_IN_BLOCKS = 0.6
"""Share of a block matrix's divergence that is left, relative to that of the embedding: 0.5 to 0.63 in mixed widths of
SmolLM2-135M."""


def at_the_end(worth: Worth, prefix: str) -> Worth:
    """What every choice costs a run that makes up for rounding in the blocks.

    Args:
        worth: Predictions for plain rounding.
        prefix: Name of the list of blocks.
    """
    return {
        name: {choice: nats * (LEFT_IN_BLOCKS if name.startswith(f"{prefix}.") else 1.0) for choice, nats in of.items()}
        for name, of in worth.items()
    }
