"""Which weights are salient: a score for every weight or input column, and the best of them.

SAGE-PTQ (arXiv 2606.05429) reads saliency from the matrix alone: a weight is salient when it lies far from the mean of
its matrix, in standard deviations. Weighed with the second moment of its input (the diagonal of the Hessian), the score
says how much of the output hangs on the weight; BiLLM (arXiv 2402.04291) and PB-LLM (arXiv 2310.00034) choose by kin
of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.weights.packing import WORD_BITS

NARROW = 8 * WORD_BITS
"""Matrices with fewer input features choose single columns, others whole words of 32."""
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


def column_step(in_features: int) -> int:
    """Columns that are chosen together: 32, so that no row of packed codes ends in padding; 1 in a narrow matrix."""
    return WORD_BITS if in_features >= NARROW else 1


def column_count(ratio: float, in_features: int) -> int:
    """Salient columns for a ratio: whole steps, and at least one step is left to the others."""
    step = column_step(in_features)
    return min(round(ratio * in_features / step), (in_features - 1) // step) * step
