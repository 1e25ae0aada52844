"""The packed linear layer as an operator of PyTorch's: opaque to ``torch.compile``, differentiable, with fake shapes.

Gradients go to x, the scales and the bias. They take the weight dense, as a training step is no place to save a
few microseconds at one token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gsq.ops.packed_linear import dispatch
from lightning_gsq.ops.packed_linear.reference import unpack_levels
from lightning_gsq.weights.quantized import reduce_groups


@torch.library.custom_op("lightning_gsq::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group_length: int, form: str
) -> Tensor:
    """``x w^T + bias``; ``bits`` are those stored, ``form`` a name of the dispatch table or "auto"."""
    chosen = dispatch.choose(x, bits, group_length) if form == "auto" else form
    with torch.autocast(x.device.type, enabled=False):
        return dispatch.run(chosen, x, words, scales, bias, bits, group_length)  # type: ignore[arg-type]


@packed_linear.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group_length: int, form: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scales, bias, ctx.bits, ctx.group_length, _ = inputs
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, words, scales)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, words, scales = ctx.saved_tensors
    dx = d_scales = d_bias = None
    dy_TO = dy.reshape(-1, dy.shape[-1])
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, words, scales, ctx.bits, ctx.in_features, ctx.group_length)
    if ctx.needs_input_grad[2]:
        d_weight_OI = (dy_TO.mT @ x.reshape(-1, x.shape[-1])).to(torch.promote_types(scales.dtype, torch.float32))
        levels_OI = unpack_levels(words, ctx.bits, ctx.in_features)
        d_scales = reduce_groups(d_weight_OI * levels_OI, ctx.group_length).to(scales.dtype)
    if ctx.needs_input_grad[3]:
        d_bias = dy_TO.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    return dx, None, d_scales, d_bias, None, None, None


@torch.library.custom_op("lightning_gsq::packed_linear_input_gradient", mutates_args=())
def _input_gradient(
    dy: Tensor, words: Tensor, scales: Tensor, bits: int, in_features: int, group_length: int
) -> Tensor:
    with torch.autocast(dy.device.type, enabled=False):
        return dy @ dispatch.dequantize(
            words, scales, bits=bits, in_features=in_features, group_length=group_length, dtype=dy.dtype
        )


@_input_gradient.register_fake
def _(dy: Tensor, words: Tensor, scales: Tensor, bits: int, in_features: int, group_length: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], in_features))


packed_linear.register_autograd(_backward, setup_context=_setup)
