"""Which weights are salient: a score for every weight or input column, and the best of them.

SAGE-PTQ (arXiv 2606.05429) reads saliency from the matrix alone: a weight is salient when it lies far from the mean of
its matrix, in standard deviations. Weighed with the second moment of its input (the diagonal of the Hessian), the score
says how much of the output hangs on the weight; BiLLM (arXiv 2402.04291) and PB-LLM (arXiv 2310.00034) choose by kin
of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12


def magnitude_score(w_OI: Tensor) -> Tensor:
    """Distance from the mean of the matrix, in standard deviations; ``O I``, fp32."""
    return (w_OI - w_OI.mean()).abs() / w_OI.std().clamp_min(TINY)


def hessian_score(w_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """:func:`magnitude_score` times the root of the input's second moment, relative to the mean one; ``O I``, fp32."""
    moment_I = hessian_II.diagonal()
    return magnitude_score(w_OI) * (moment_I / moment_I.mean().clamp_min(TINY)).sqrt()


def salient_mask(score_OI: Tensor, ratio: float) -> Tensor:
    """The ``ratio`` of all weights with the highest score, bool ``O I``; among equals, the first ones."""
    flat = score_OI.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[: round(ratio * flat.numel())]] = True
    return mask.view_as(score_OI)
