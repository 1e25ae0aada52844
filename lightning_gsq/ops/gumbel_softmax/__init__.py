"""A relaxed sample of a weight from its logits, and both gradients.

reference  the specification
fused      the same in one pass, compiled where there is a compiler
kernels    Triton
noise      uniform numbers from a seed and a counter
vectors    the same where neighbouring weights choose together
op         the operator that torch knows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_gsq.ops.gumbel_softmax import op
from lightning_gsq.ops.gumbel_softmax.fused import Backend, numbers_of
from lightning_gsq.weights.quantized import expand_groups

__all__ = ["Backend", "gumbel_softmax_values", "gumbel_softmax_weight"]


def gumbel_softmax_weight(
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
    backend: Backend = "auto",
) -> Tensor:
    """Samples ``w = s * (base + sum_l v_l softmax((kappa * logits + noise * g) / tau)_l)`` with ``g`` Gumbel noise.

    Args:
        logits_LOI: fp32, bf16 or fp64; -inf rules a level out. ``L = 1`` means the binary form
            ``w = s * tanh((2 kappa * logit + noise * logistic) / (2 tau))``.
        scales_OG: Scales, fp32 or fp64.
        levels: Grid levels, or shifts around ``base_OI``; not used by the binary form.
        base_OI: Codes that the shifts are relative to (any dtype), or None.
        kappa: Logit scale.
        tau: Temperature, positive.
        noise: Factor on the noise; 0 draws none.
        seed: Seed of this call's noise, 63 bits; the backward pass draws the same again.
        first_row: Number of the first row in a larger matrix of the same width, whose noise these rows get.
        group_length: Weights in a full group; the last group of a row may be shorter.
        backend: "triton" (CUDA), "compile" (``torch.compile``), "eager" (uncompiled), or "auto" for the first of them
            that works here.

    Returns:
        ``w_OI`` in the logits' dtype, differentiable in logits and scales.
    """
    numbers, words = numbers_of((kappa, tau, noise), seed, logits_LOI, first_row)
    result: Tensor = op.gumbel_softmax_weight(
        logits_LOI, scales_OG, base_OI, levels, numbers, words, group_length, backend
    )
    return result


def gumbel_softmax_values(logits_LOI: Tensor, scales_OG: Tensor, values: Sequence[Tensor], **settings: Any) -> Tensor:
    """Samples ``w = s * sum_l v_l softmax(...)_l`` where candidates have values of their own for each weight.

    The op with levels 0, ..., 1, ..., 0 gives one candidate's probability; the same seed draws the same noise every
    time, so that ``L - 1`` calls give all of them.

    Args:
        logits_LOI: As in :func:`gumbel_softmax_weight`; at least two candidates.
        scales_OG: Scales.
        values: Of each candidate, fp32 ``O I``.
        settings: The keyword arguments of :func:`gumbel_softmax_weight`.

    Returns:
        ``w_OI`` in the logits' dtype, differentiable in logits and scales.
    """
    count, first = len(values), values[0]
    w_OI = expand_groups(scales_OG, first.shape[1], settings["group_length"]) * first
    for index in range(1, count):
        one = tuple(float(level == index) for level in range(count))
        w_OI = w_OI + gumbel_softmax_weight(logits_LOI, scales_OG, one, **settings) * (values[index] - first)
    return w_OI.to(logits_LOI.dtype)
