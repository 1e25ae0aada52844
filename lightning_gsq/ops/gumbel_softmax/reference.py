"""The specification of the sampling op, in plain differentiable PyTorch.

Every other form of the op is tested against these few lines in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.ops.gumbel_softmax.noise import counters, seed_words, uniform
from lightning_gsq.weights.quantized import expand_groups


def gumbel_softmax_weight_reference(
    logits_LOI: Tensor,
    scales_OG: Tensor,
    levels: tuple[float, ...],
    base_OI: Tensor | None = None,
    *,
    kappa: float,
    tau: float,
    noise: float = 1.0,
    seed: int = 0,
    first_row: int = 0,
    group_length: int,
) -> Tensor:
    """The same as :func:`lightning_gsq.ops.gumbel_softmax.gumbel_softmax_weight`, differentiated by autograd."""
    dtype, (count, rows, columns) = logits_LOI.dtype, logits_LOI.shape
    logits_LOI = logits_LOI.to(torch.promote_types(dtype, torch.float32))
    words = seed_words(seed, first_row * columns).to(logits_LOI.device)
    position_OI = counters(rows, columns, columns, 0, logits_LOI.device) + words[2]
    u_LOI = torch.stack([uniform(position_OI * count + level, words) for level in range(count)]).to(logits_LOI.dtype)
    if count == 1:
        mean_OI = torch.tanh((2 * kappa * logits_LOI + noise * torch.logit(u_LOI))[0] / (2 * tau))
    else:
        gumbel_LOI = -torch.log(-torch.log(u_LOI))
        probabilities_LOI = torch.softmax((kappa * logits_LOI + noise * gumbel_LOI) / tau, dim=0)
        v_L = torch.tensor(levels, dtype=logits_LOI.dtype, device=logits_LOI.device)
        mean_OI = (probabilities_LOI * v_L.view(-1, 1, 1)).sum(0)
    if base_OI is not None:
        mean_OI = mean_OI + base_OI
    return (mean_OI * expand_groups(scales_OG, columns, group_length)).to(dtype)
