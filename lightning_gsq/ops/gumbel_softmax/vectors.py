"""A relaxed choice among vectors: the codes of neighbouring weights are chosen together.

Plain PyTorch: one softmax stands for four or eight weights, so that little of a step's time is spent here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gsq.ops.gumbel_softmax.noise import counters, seed_words, uniform


class _Mean(torch.autograd.Function):
    """``sum_l p_l c_l`` over vectors; the candidates stay the small integers that they are."""

    @staticmethod
    def forward(ctx: Any, p_LOU: Tensor, codes_LOUC: Tensor) -> Tensor:
        ctx.save_for_backward(codes_LOUC)
        mean_OUC = p_LOU.new_zeros(codes_LOUC.shape[1:])
        for p_OU, codes_OUC in zip(p_LOU, codes_LOUC, strict=True):
            mean_OUC += p_OU[..., None] * codes_OUC
        return mean_OUC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (codes_LOUC,) = ctx.saved_tensors
        return torch.stack([(grads[0] * codes_OUC).sum(-1) for codes_OUC in codes_LOUC]), None


def gumbel_softmax_vectors(
    logits_LOU: Tensor,
    codes_LOI: Tensor,
    *,
    kappa: float,
    tau: float,
    noise: float = 1.0,
    seed: int = 0,
    first_row: int = 0,
) -> Tensor:
    """Samples ``sum_l c_l softmax((kappa * logits + noise * g) / tau)_l`` with Gumbel noise ``g``, one draw a group.

    Args:
        logits_LOU: One logit a candidate and group of ``I / U`` weights, of any float type.
        codes_LOI: The candidates.
        kappa: Logit scale.
        tau: Temperature, positive.
        noise: Factor on the noise; 0 draws none.
        seed: Seed of this call's noise, 63 bits.
        first_row: Number of the first row in a larger matrix of the same width, whose noise these rows get.

    Returns:
        fp32 (fp64 for such logits) ``O I``, differentiable in the logits.
    """
    count, rows, groups = logits_LOU.shape
    z_LOU = kappa * logits_LOU.to(torch.promote_types(logits_LOU.dtype, torch.float32))
    if noise:
        words = seed_words(seed, first_row * groups).to(z_LOU.device)
        position_OU = counters(rows, groups, groups, 0, z_LOU.device) + words[2]
        u_LOU = torch.stack([uniform(position_OU * count + level, words) for level in range(count)])
        z_LOU = z_LOU - noise * torch.log(-torch.log(u_LOU))
    p_LOU = torch.softmax(z_LOU / tau, dim=0)
    mean: Tensor = _Mean.apply(p_LOU, codes_LOI.unflatten(-1, (groups, -1)))
    return mean.flatten(-2)
