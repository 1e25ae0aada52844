"""The specification of the sampling op, in plain differentiable PyTorch.

Every other form of the op is tested against these few lines in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.qtensor import expand_groups


def gumbel_softmax_weight_reference(
    logits_LOI: Tensor,
    scales_OG: Tensor,
    levels_L: Tensor,
    base_OI: Tensor | None,
    noise_LOI: Tensor | None,
    kappa: float,
    tau: float,
    group_length: int,
) -> Tensor:
    """``w = s * (base + sum_l v_l softmax((kappa * logits + noise) / tau)_l)``, by autograd.

    Args:
        logits_LOI: Floating point; -inf rules a level out. With ``L = 1`` the binary form
            ``w = s * tanh((2 kappa * logit + noise) / (2 tau))`` is meant.
        scales_OG: Scales.
        levels_L: Grid levels, or shifts around ``base_OI``; not used by the binary form.
        base_OI: Codes that the shifts are relative to, or None.
        noise_LOI: Gumbel noise (binary: logistic noise), or None for the relaxation's mode.
        kappa: Logit scale.
        tau: Temperature.
        group_length: Weights in a full group.

    Returns:
        The sampled weight ``O I`` in the logits' dtype.
    """
    noise = 0 if noise_LOI is None else noise_LOI
    if len(logits_LOI) == 1:
        mean_OI = torch.tanh(((2 * kappa * logits_LOI + noise) / (2 * tau))[0])
    else:
        probabilities = torch.softmax((kappa * logits_LOI + noise) / tau, dim=0)
        mean_OI = (probabilities * levels_L.to(logits_LOI.dtype).view(-1, 1, 1)).sum(0)
    if base_OI is not None:
        mean_OI = mean_OI + base_OI
    return mean_OI * expand_groups(scales_OG, mean_OI.shape[1], group_length)
