"""The sampling op as an operator of PyTorch's, with its gradient: opaque to ``torch.compile``, with fake shapes.

Everything that changes from step to step (kappa, tau, the noise's factor, the seed) comes as tensors, so that neither
a compiled caller nor a CUDA graph is tied to a step's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gsq.ops.gumbel_softmax import fused


@torch.library.custom_op("lightning_gsq::gumbel_softmax_weight", mutates_args=())
def gumbel_softmax_weight(
    logits: Tensor,
    scales: Tensor,
    base: Tensor | None,
    levels: Sequence[float],
    numbers: Tensor,
    seed: Tensor,
    group_length: int,
    backend: str,
) -> Tensor:
    """The weight ``O I`` in the logits' dtype.

    Args:
        logits: ``L O I``.
        scales: ``O G``.
        base: ``O I`` or None.
        levels: One a plane; not used for ``L = 1``.
        numbers: kappa, tau and the noise's factor, fp32 (fp64 for fp64 logits), on the logits' device.
        seed: The int32 words of ``noise.seed_words``, on the logits' device.
        group_length: Weights in a full group.
        backend: See ``fused.resolve``.
    """
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        if fused.resolve(backend, logits) == "triton":
            from lightning_gsq.ops.gumbel_softmax import kernels

            grid = fused.level_tensor(tuple(levels), logits.device)
            return kernels.forward(logits, scales, base, grid, numbers, seed, group_length)
        return fused.forward(logits, scales, base, tuple(levels), numbers, seed, group_length, backend)


@torch.library.custom_op("lightning_gsq::gumbel_softmax_weight_backward", mutates_args=())
def _gradient(
    r: Tensor,
    logits: Tensor,
    scales: Tensor,
    base: Tensor | None,
    levels: Sequence[float],
    numbers: Tensor,
    seed: Tensor,
    group_length: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        if fused.resolve(backend, logits) == "triton":
            from lightning_gsq.ops.gumbel_softmax import kernels

            grid = fused.level_tensor(tuple(levels), logits.device)
            return kernels.backward(r, logits, scales, base, grid, numbers, seed, group_length)
        return fused.backward(r, logits, scales, base, tuple(levels), numbers, seed, group_length, backend)


@gumbel_softmax_weight.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape[1:], dtype=logits.dtype, device=logits.device)


@_gradient.register_fake
def _(r: Tensor, logits: Tensor, scales: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    like = torch.contiguous_format
    return torch.empty_like(logits, memory_format=like), torch.empty_like(scales, memory_format=like)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, scales, base, ctx.levels, numbers, seed, ctx.group_length, ctx.backend = inputs
    ctx.save_for_backward(logits, scales, base, numbers, seed)


def _backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:
    logits, scales, base, numbers, seed = ctx.saved_tensors
    d_logits, d_scales = _gradient(r, logits, scales, base, ctx.levels, numbers, seed, ctx.group_length, ctx.backend)
    return d_logits, d_scales, *(None,) * 6


gumbel_softmax_weight.register_autograd(_backward, setup_context=_setup)
