"""``w = code * scale`` with a backward pass that reduces to one number a group.

Autograd would keep the expanded scales and write a gradient as large as the weight; here the weight's gradient is
summed over its groups as soon as it is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gsq.weights.quantized import expand_groups, reduce_groups


class _ScaledCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scales_OG: Tensor, codes_OI: Tensor, group_length: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes_OI)
        ctx.group_length, ctx.dtype = group_length, scales_OG.dtype
        rows, columns = codes_OI.shape
        if columns % group_length:
            return (codes_OI * expand_groups(scales_OG, columns, group_length)).to(dtype)
        codes_OGL = codes_OI.view(rows, -1, group_length)
        w_OGL = torch.empty(codes_OGL.shape, dtype=dtype, device=codes_OI.device)
        return torch.mul(codes_OGL, scales_OG[..., None], out=w_OGL).view(rows, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (codes_OI,) = ctx.saved_tensors
        product_OI = grads[0] * codes_OI
        wide = torch.promote_types(ctx.dtype, torch.float32)
        return reduce_groups(product_OI.to(wide), ctx.group_length).to(ctx.dtype), None, None, None


def scaled_codes(codes_OI: Tensor, scales_OG: Tensor, group_length: int, dtype: torch.dtype) -> Tensor:
    """The dense weight ``O I`` in ``dtype``, differentiable in the scales.

    Args:
        codes_OI: int8 levels.
        scales_OG: Scales, differentiable.
        group_length: Weights in a full group; the last group of a row may be shorter.
        dtype: Of the weight: ``code * scale``, rounded once.
    """
    result: Tensor = _ScaledCodes.apply(scales_OG, codes_OI, group_length, dtype)
    return result
