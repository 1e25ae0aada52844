"""The specification of the distillation loss, in plain differentiable PyTorch over whole ``N V`` logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gsq.ops.distillation.targets import Head, HiddenTarget, Target


def distillation_loss_reference(
    hidden_ND: Tensor,
    head: Head,
    target: Target,
    labels_N: Tensor,
    *,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`lightning_gsq.ops.distillation.distillation_loss`, differentiated by autograd."""
    logits_NV = head.logits(hidden_ND)
    log_q_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    if isinstance(target, HiddenTarget):
        log_p_NV = torch.log_softmax(target.head.logits(target.hidden_ND) / temperature, dim=-1)
        kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    else:
        log_p_NK = target.log_probs_NK.to(log_q_NV)
        p_NK, log_q_NK = log_p_NK.exp(), log_q_NV.gather(1, target.tokens_NK.long())
        rest_p_N = (1 - p_NK.sum(-1)).clamp_min(0)
        others_NV = log_q_NV.scatter(1, target.tokens_NK.long(), -torch.inf)
        rest_log_q_N = torch.logsumexp(others_NV, dim=-1)
        kl_N = (p_NK * (log_p_NK - log_q_NK)).sum(-1) + torch.xlogy(rest_p_N, rest_p_N) - rest_p_N * rest_log_q_N
    kl = temperature**2 * kl_N.mean()
    ce = nn.functional.cross_entropy(logits_NV, labels_N)
    return (1 - cross_entropy) * kl + cross_entropy * ce, kl, ce
