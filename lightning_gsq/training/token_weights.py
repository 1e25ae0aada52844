"""How much each token counts in a block's loss.

Where a few tokens carry massive activations (arXiv 2402.17762), thousands of times the energy of the others, an error
that one block makes on them stays in the residual stream for many blocks: none can repair it, and it drowns everything
that they could still improve. A token counts less the more error it brings along.
"""

from __future__ import annotations

import torch
from torch import Tensor


def typical_energy(hidden_NTD: Tensor) -> float:
    """Median over all tokens of the mean square of their hidden states."""
    return float(torch.cat([x_TD.float().square().mean(-1) for x_TD in hidden_NTD]).median())


def inherited_weights(quantized_NTD: Tensor, full_NTD: Tensor, tolerated: float) -> Tensor:
    """Weights ``N T`` in (0, 1], fp32: ``1 / (1 + error / tolerated)`` with the squared error that a token enters with.

    Args:
        quantized_NTD: Inputs of the block in the quantized model.
        full_NTD: Inputs of the block in the full-precision model.
        tolerated: Mean squared error at which a token counts half.
    """
    pairs = zip(quantized_NTD, full_NTD, strict=True)
    errors = [(q_TD.float() - f_TD.float()).square().mean(-1) for q_TD, f_TD in pairs]
    return 1 / (1 + torch.stack(errors) / max(tolerated, 1e-30))
