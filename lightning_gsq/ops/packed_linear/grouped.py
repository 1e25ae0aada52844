"""Products of sorted tokens with the packed weights of experts: one pass over contiguous groups of tokens.

The weights of ``E`` experts lie one after the other, ``E O`` rows; ``offsets_E`` says where each one's tokens begin.
Only weights that have tokens are read. Forms are those of :mod:`dispatch`, chosen by the tokens that a weight has:

| form      | what it does here                                                                                  |
|-----------|----------------------------------------------------------------------------------------------------|
| gemv      | Triton, each token with its own weight: at most a token a weight on average                          |
| batch     | Triton, tiles of tokens of one weight: at most 64                                                   |
| cpu       | the C++ library, one call for all weights with few tokens; the others dense                          |
| dense     | weight by weight made dense, and PyTorch's matrix product                                           |
| reference | the specification                                                                                   |
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_gsq.ops.packed_linear import cpu, dispatch
from lightning_gsq.ops.packed_linear.reference import grouped_packed_linear_reference, unpack_levels
from lightning_gsq.weights.quantized import reduce_groups


def choose(x_SI: Tensor, experts: int, bits: int, group_length: int) -> dispatch.Form:
    """The form for this input: the table's for the tokens that a weight has on average.

    On a CPU each weight has its own: :func:`_on_cpu` counts.
    """
    on_average = -(-len(x_SI) // experts)
    few = x_SI[:1] if x_SI.device.type == "cpu" else x_SI[: max(1, on_average)]
    return dispatch.choose(few, bits, group_length)


@torch.library.custom_op("lightning_gsq::grouped_packed_linear", mutates_args=())
def grouped_packed_linear(
    x_SI: Tensor, words_OW: Tensor, scales_OG: Tensor, offsets_E: Tensor, bits: int, group_length: int, form: str
) -> Tensor:
    """``x w_e^T`` for each weight's tokens; ``bits`` are those stored, ``form`` a name of the table or "auto"."""
    experts = len(offsets_E) - 1
    chosen = choose(x_SI, experts, bits, group_length) if form == "auto" else form
    settings: dict[str, Any] = {"bits": bits, "group_length": group_length}
    with torch.autocast(x_SI.device.type, enabled=False):
        if chosen == "reference":
            return grouped_packed_linear_reference(
                x_SI, words_OW, scales_OG, offsets_E, in_features=x_SI.shape[1], **settings
            )
        if chosen in ("gemv", "batch"):
            from lightning_gsq.ops.packed_linear import grouped_kernels
            from lightning_gsq.ops.packed_linear.tuning import tile_for

            tile = tile_for(x_SI.device, bits, 1 if chosen == "gemv" else max(2, -(-len(x_SI) // experts)))
            return grouped_kernels.linear(x_SI, words_OW, scales_OG, offsets_E, tile=tile, **settings)
        return _weight_by_weight(x_SI, words_OW, scales_OG, offsets_E.tolist(), chosen == "cpu", bits, group_length)


@grouped_packed_linear.register_fake
def _(
    x_SI: Tensor, words_OW: Tensor, scales_OG: Tensor, offsets_E: Tensor, bits: int, group_length: int, form: str
) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], words_OW.shape[0] // (offsets_E.shape[0] - 1))


def _weight_by_weight(
    x_SI: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    offsets: list[int],
    library: bool,
    bits: int,
    group_length: int,
) -> Tensor:
    """Those with few tokens in one call of the C++ library, where that is to be used; the others made dense."""
    rows = words_OW.shape[0] // (len(offsets) - 1)
    most = cpu.MOST_TOKENS if library else 0
    counts = [end - first for first, end in pairwise(offsets)]
    y_SO = x_SI.new_zeros(len(x_SI), rows)
    if any(0 < count <= most for count in counts):
        fp32_SO = torch.zeros(len(x_SI), rows)
        cpu.grouped(fp32_SO, x_SI, words_OW, scales_OG, offsets, bits=bits, group_length=group_length)
        y_SO = fp32_SO.to(x_SI.dtype)
    for expert, count in enumerate(counts):
        if count > most:
            tokens, own = slice(offsets[expert], offsets[expert + 1]), slice(expert * rows, (expert + 1) * rows)
            y_SO[tokens] = dispatch.run("dense", x_SI[tokens], words_OW[own], scales_OG[own], None, bits, group_length)
    return y_SO


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_SI, words_OW, scales_OG, offsets_E, ctx.bits, ctx.group_length, _ = inputs
    ctx.in_features = x_SI.shape[1]
    ctx.save_for_backward(x_SI if ctx.needs_input_grad[2] else None, words_OW, scales_OG, offsets_E)


def _backward(ctx: Any, dy_SO: Tensor) -> tuple[Tensor | None, ...]:
    x_SI, words_OW, scales_OG, offsets_E = ctx.saved_tensors
    settings = (ctx.bits, ctx.in_features, ctx.group_length)
    dx_SI = d_scales_OG = None
    if ctx.needs_input_grad[0]:
        dx_SI = _input_gradient(dy_SO, words_OW, scales_OG, offsets_E, *settings)
    if ctx.needs_input_grad[2]:
        d_scales_OG = _scale_gradient(dy_SO, x_SI, words_OW, scales_OG, offsets_E, *settings)
    return dx_SI, None, d_scales_OG, None, None, None, None


@torch.library.custom_op("lightning_gsq::grouped_packed_linear_input_gradient", mutates_args=())
def _input_gradient(
    dy_SO: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    offsets_E: Tensor,
    bits: int,
    in_features: int,
    group_length: int,
) -> Tensor:
    dx_SI = dy_SO.new_zeros(len(dy_SO), in_features)
    settings: dict[str, Any] = {"bits": bits, "in_features": in_features, "group_length": group_length}
    with torch.autocast(dy_SO.device.type, enabled=False):
        for tokens, own in _groups(offsets_E, dy_SO.shape[1]):
            w_OI = dispatch.dequantize(words_OW[own], scales_OG[own], **settings, dtype=dy_SO.dtype)
            dx_SI[tokens] = dy_SO[tokens] @ w_OI
    return dx_SI


@_input_gradient.register_fake
def _(
    dy_SO: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    offsets_E: Tensor,
    bits: int,
    in_features: int,
    group_length: int,
) -> Tensor:
    return dy_SO.new_empty(dy_SO.shape[0], in_features)


@torch.library.custom_op("lightning_gsq::grouped_packed_linear_scale_gradient", mutates_args=())
def _scale_gradient(
    dy_SO: Tensor,
    x_SI: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    offsets_E: Tensor,
    bits: int,
    in_features: int,
    group_length: int,
) -> Tensor:
    gradient_OG = torch.zeros_like(scales_OG)
    wide = torch.promote_types(scales_OG.dtype, torch.float32)
    with torch.autocast(dy_SO.device.type, enabled=False):
        for tokens, own in _groups(offsets_E, dy_SO.shape[1]):
            d_weight_OI = (dy_SO[tokens].mT @ x_SI[tokens]).to(wide)
            levels_OI = unpack_levels(words_OW[own], bits, in_features)
            gradient_OG[own] = reduce_groups(d_weight_OI * levels_OI, group_length).to(scales_OG.dtype)
    return gradient_OG


@_scale_gradient.register_fake
def _(
    dy_SO: Tensor,
    x_SI: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    offsets_E: Tensor,
    bits: int,
    in_features: int,
    group_length: int,
) -> Tensor:
    return torch.empty_like(scales_OG)


def _groups(offsets_E: Tensor, rows: int) -> list[tuple[slice, slice]]:
    """Tokens and rows of each weight that has tokens."""
    offsets = offsets_E.tolist()
    bounds = enumerate(pairwise(offsets))
    return [(slice(first, end), slice(e * rows, (e + 1) * rows)) for e, (first, end) in bounds if end > first]


grouped_packed_linear.register_autograd(_backward, setup_context=_setup)
