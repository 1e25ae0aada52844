"""The divergence of a student's next tokens from a teacher's, without holding all logits at once.

reference  the specification
chunked    some positions at a time, gradients computed on the way
targets    what the student is compared with
"""

from __future__ import annotations

from torch import Tensor

from lightning_gsq.ops.distillation.chunked import IGNORED, DistillationLoss
from lightning_gsq.ops.distillation.targets import Head, HiddenTarget, Target, TopKTarget

__all__ = ["IGNORED", "Head", "HiddenTarget", "Target", "TopKTarget", "distillation_loss"]


def distillation_loss(
    hidden_ND: Tensor,
    head: Head,
    target: Target,
    labels_N: Tensor,
    *,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    chunk: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(1 - m) T² KL(teacher | student) + m CE``, means over positions, without ever holding ``N V`` logits.

    Args:
        hidden_ND: What enters the student's head; differentiable.
        head: The student's head; its weight and bias are differentiable too.
        target: The teacher, by its hidden states or by its most probable tokens.
        labels_N: Next tokens (int64), ``IGNORED`` where there is none; for the cross-entropy only.
        temperature: ``T``; above 1 the unlikely tokens count more.
        cross_entropy: ``m``, from 0 (divergence alone) to 1 (cross-entropy alone).
        chunk: Positions whose logits are held at once.

    Returns:
        The loss, ``T² KL`` and the cross-entropy; the latter two for reading only. Under autocast the products are
        computed in its dtype, everything else in fp32.
    """
    loss, kl, ce = DistillationLoss.apply(
        hidden_ND, head.weight_VD, head.bias_V, head, target, labels_N, temperature, cross_entropy, chunk
    )
    return loss, kl, ce
