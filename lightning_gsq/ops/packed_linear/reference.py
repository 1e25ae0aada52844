"""Products with a packed matrix, in plain PyTorch: the specification.

A row of codes is a little-endian bit stream in int32 words (``lightning_gsq/packing.py``); weight ``i`` of row ``o`` is

    w[o, i] = level(code[o, i]) * s[o, i // group_length]

with ``level(code) = code - 2^(b-1)`` for two bits and more (ternary: two bits), and ``2 * code - 1`` for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.packing import WORD_BITS
from lightning_gsq.scheme import Bits


def unpack_codes(words_OW: Tensor, storage_bits: int, in_features: int) -> Tensor:
    """Unsigned codes ``O I`` (int32) of packed rows, on their own device."""
    first_bit_I = torch.arange(in_features, device=words_OW.device) * storage_bits
    word_I, shift_I = first_bit_I // WORD_BITS, (first_bit_I % WORD_BITS).int()
    mask = 2**storage_bits - 1
    # An arithmetic shift of a negative word brings in ones from the left, which the mask takes away again unless the
    # code goes on in the next word: there the ones have to go first.
    low_OI = (words_OW[:, word_I] >> shift_I) & mask
    if WORD_BITS % storage_bits == 0:
        return low_OI
    straddles_I = shift_I + storage_bits > WORD_BITS
    own_bits_I = torch.where(straddles_I, WORD_BITS - shift_I, storage_bits)
    low_OI = low_OI & ((1 << own_bits_I) - 1)
    next_I = torch.where(straddles_I, word_I + 1, word_I)
    high_OI = (words_OW[:, next_I] << own_bits_I) & mask
    return torch.where(straddles_I, low_OI | high_OI, low_OI)


def dequantize_packed(
    words_OW: Tensor, scales_OG: Tensor, *, bits: Bits, in_features: int, group_length: int, dtype: torch.dtype
) -> Tensor:
    """The dense matrix of packed codes and scales.

    Args:
        words_OW: int32 words.
        scales_OG: Floating point.
        bits: 1, "ternary", 2 ... 8.
        in_features: ``I``.
        group_length: Weights that share a scale; the last group of a row may be shorter.
        dtype: Dtype of the result; computed in fp32 and rounded once.

    Returns:
        ``w_OI``.
    """
    storage_bits = 2 if bits == "ternary" else bits
    codes_OI = unpack_codes(words_OW, storage_bits, in_features)
    levels_OI = 2 * codes_OI - 1 if bits == 1 else codes_OI - 2 ** (storage_bits - 1)
    scales_OI = scales_OG.float().repeat_interleave(group_length, dim=1)[:, :in_features]
    return (levels_OI * scales_OI).to(dtype)


def packed_linear(
    x: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    bias: Tensor | None = None,
    *,
    bits: Bits,
    in_features: int,
    group_length: int,
) -> Tensor:
    """``x w^T + bias`` with a packed ``w``, dequantized in the dtype of ``x``.

    Args:
        x: ``... I``.
        words_OW: int32 words.
        scales_OG: Floating point.
        bias: ``O``, or None.
        bits: 1, "ternary", 2 ... 8.
        in_features: ``I``.
        group_length: Weights that share a scale.

    Returns:
        ``... O`` in the dtype of ``x``.
    """
    w_OI = dequantize_packed(
        words_OW, scales_OG, bits=bits, in_features=in_features, group_length=group_length, dtype=x.dtype
    )
    return torch.nn.functional.linear(x, w_OI, None if bias is None else bias.to(x.dtype))
