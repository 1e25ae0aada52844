"""The specification of the packed ops, in plain PyTorch, on any device.

Value ``i`` of a row starts at bit ``i * bits`` of the row's little-endian stream of int32 words
(:mod:`lightning_gsq.weights.packing`) and may straddle two words. A stored value ``q`` means the level ``2 q - 1`` at
1 bit and ``q - 2^(bits - 1)`` above (ternary is stored in 2 bits); the weight is the level times its group's scale.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_gsq.weights.packing import WORD_BITS
from lightning_gsq.weights.quantized import expand_groups


def unpack_levels(words_OW: Tensor, bits: int, in_features: int) -> Tensor:
    """The signed levels ``O I``, int16.

    Args:
        words_OW: int32 words.
        bits: Bits that one stored value takes.
        in_features: ``I``.
    """
    values_OI = unpack_values(words_OW, bits, in_features)
    return 2 * values_OI - 1 if bits == 1 else values_OI - (1 << bits - 1)


def unpack_values(words_OW: Tensor, bits: int, in_features: int) -> Tensor:
    """The stored values ``O I`` as they are, unsigned, int16, on the words' device; arguments as above."""
    start_I = torch.arange(in_features, device=words_OW.device) * bits
    word_I, shift_I = start_I // WORD_BITS, start_I % WORD_BITS
    unsigned_OW = words_OW.long() & 0xFFFFFFFF
    following_OW = nn.functional.pad(unsigned_OW[:, 1:], (0, 1))
    stream_OI = unsigned_OW[:, word_I] | following_OW[:, word_I] << WORD_BITS
    return (stream_OI >> shift_I & (1 << bits) - 1).to(torch.int16)


def dequantize_packed_reference(
    words_OW: Tensor, scales_OG: Tensor, *, bits: int, in_features: int, group_length: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight ``O I``, computed in fp32 (fp64 for fp64 scales) and rounded once; ``bits`` are those stored."""
    scales_OG = scales_OG.to(torch.promote_types(scales_OG.dtype, torch.float32))
    levels_OI = unpack_levels(words_OW, bits, in_features)
    return (levels_OI * expand_groups(scales_OG, in_features, group_length)).to(dtype)


def packed_linear_reference(
    x: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    bias_O: Tensor | None = None,
    *,
    bits: int,
    in_features: int,
    group_length: int,
) -> Tensor:
    """``x w^T + bias`` in fp32 or wider, rounded once to x's dtype; ``bits`` are those stored."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, scales_OG.dtype), torch.float32)
    w_OI = dequantize_packed_reference(
        words_OW, scales_OG.to(dtype), bits=bits, in_features=in_features, group_length=group_length, dtype=dtype
    )
    return nn.functional.linear(x.to(dtype), w_OI, None if bias_O is None else bias_O.to(dtype)).to(x.dtype)


def grouped_packed_linear_reference(
    x_SI: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    offsets_E: Tensor,
    *,
    bits: int,
    in_features: int,
    group_length: int,
) -> Tensor:
    """``x w_e^T`` for each weight ``e`` of some one after the other, ``S O``; zeros for tokens of none.

    Args:
        x_SI: Tokens, those of the first weight first.
        words_OW: Packed codes of all weights, the rows of the first one first.
        scales_OG: Their scales.
        offsets_E: Where each weight's tokens begin, and where the last one's end: one more than there are weights.
        bits: Bits that one stored value takes.
        in_features: ``I``.
        group_length: Weights in a full group.
    """
    offsets = offsets_E.tolist()
    rows = words_OW.shape[0] // (len(offsets) - 1)
    y_SO = x_SI.new_zeros(len(x_SI), rows)
    for expert, (first, end) in enumerate(pairwise(offsets)):
        own = slice(expert * rows, (expert + 1) * rows)
        y_SO[first:end] = packed_linear_reference(
            x_SI[first:end],
            words_OW[own],
            scales_OG[own],
            bits=bits,
            in_features=in_features,
            group_length=group_length,
        )
    return y_SO
