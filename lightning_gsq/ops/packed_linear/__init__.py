"""Linear layers over packed codes: what a quantized model runs on.

The weight stays packed (:mod:`lightning_gsq.weights.packing`) and its scales beside it; nothing dense is kept. At few
tokens the work is bound by reading the weight, so that 2 bits beat 16 by what they save; at many tokens it is bound by
arithmetic, and the weight is made dense for the call.

reference        the specification
dispatch         which form runs
op               the operators that torch knows
grouped          the same for tokens sorted by expert and the weights of all experts
cpu              the loop in C++, compiled where there is a compiler
kernels          Triton
grouped_kernels  Triton for sorted tokens
tuning           tiles of the Triton kernels
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_gsq.ops.packed_linear import dispatch, grouped, op
from lightning_gsq.ops.packed_linear.reference import unpack_values
from lightning_gsq.weights.grid import Bits, grid_of
from lightning_gsq.weights.packing import packed_words

__all__ = ["dequantize_packed", "grouped_packed_linear", "packed_linear", "unpack_values"]


def dequantize_packed(
    words_OW: Tensor,
    scales_OG: Tensor,
    *,
    bits: Bits,
    in_features: int,
    group_length: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight ``O I`` of packed codes, computed in fp32 and rounded once to ``dtype``.

    Args:
        words_OW: Packed codes, int32, any strides (GPTQ's ``qweight`` transposed is one).
        scales_OG: Floating point, one a group.
        bits: The scheme's bits: 1, "ternary", 2 ... 8.
        in_features: ``I``.
        group_length: Weights in a full group.
        dtype: Of the result.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    stored = _check(words_OW, scales_OG, bits, in_features, group_length)
    return dispatch.dequantize(
        words_OW, scales_OG, bits=stored, in_features=in_features, group_length=group_length, dtype=dtype
    )


def packed_linear(
    x: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    bias_O: Tensor | None = None,
    *,
    bits: Bits,
    in_features: int,
    group_length: int,
    form: dispatch.Form | Literal["auto"] = "auto",
) -> Tensor:
    """``x w^T + bias`` with the weight packed.

    Args:
        x: ``... I``, fp32, bf16 or fp16.
        words_OW: Packed codes, int32, any strides (GPTQ's ``qweight`` transposed is one).
        scales_OG: Floating point, one a group.
        bias_O: Floating point, or None.
        bits: The scheme's bits: 1, "ternary", 2 ... 8.
        in_features: ``I``.
        group_length: Weights in a full group.
        form: A form of ``dispatch.py``, or "auto" for its table's.

    Returns:
        ``... O`` in x's dtype; differentiable in x, scales and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    stored = _check(words_OW, scales_OG, bits, in_features, group_length)
    if x.shape[-1] != in_features:
        raise ValueError(f"expected x with {in_features} features in its last dimension, got {tuple(x.shape)}")
    result: Tensor = op.packed_linear(x, words_OW, scales_OG, bias_O, stored, min(group_length, in_features), form)
    return result


def grouped_packed_linear(
    x_SI: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    offsets_E: Tensor,
    *,
    bits: Bits,
    in_features: int,
    group_length: int,
    form: dispatch.Form | Literal["auto"] = "auto",
) -> Tensor:
    """``x w_e^T`` for tokens sorted by the expert ``e`` that they meet, with all experts' weights packed.

    Args:
        x_SI: ``S I``, fp32, bf16 or fp16; the first expert's tokens first.
        words_OW: Packed codes, int32, ``E O`` rows, those of the first expert first.
        scales_OG: Floating point, one a group.
        offsets_E: int64, ``E + 1``: where each expert's tokens begin, and where the last one's end.
        bits: The scheme's bits: 1, "ternary", 2 ... 8.
        in_features: ``I``.
        group_length: Weights in a full group.
        form: A form of ``grouped.py``, or "auto" for its table's.

    Returns:
        ``S O`` in x's dtype, zeros for tokens beyond the last expert's; differentiable in x and scales.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    stored = _check(words_OW, scales_OG, bits, in_features, group_length)
    experts = offsets_E.shape[0] - 1
    if x_SI.ndim != 2 or x_SI.shape[1] != in_features:
        raise ValueError(f"expected x of shape (S, {in_features}), got {tuple(x_SI.shape)}")
    if offsets_E.ndim != 1 or offsets_E.dtype != torch.int64 or experts < 1 or words_OW.shape[0] % experts:
        raise ValueError(
            f"expected int64 offsets, one more than experts that divide {words_OW.shape[0]} rows, "
            f"got {offsets_E.dtype} {tuple(offsets_E.shape)}"
        )
    result: Tensor = grouped.grouped_packed_linear(
        x_SI, words_OW, scales_OG, offsets_E, stored, min(group_length, in_features), form
    )
    return result


def _check(words_OW: Tensor, scales_OG: Tensor, bits: Bits, in_features: int, group_length: int) -> int:
    """Bits that one stored value takes; raises where the arguments do not fit."""
    stored = grid_of(bits).storage_bits
    words, groups = packed_words(in_features, stored), -(-in_features // group_length)
    if words_OW.dtype != torch.int32 or words_OW.ndim != 2 or words_OW.shape[1] != words:
        raise ValueError(
            f"expected int32 words of shape (O, {words}) for {in_features} values of {stored} bits, "
            f"got {words_OW.dtype} {tuple(words_OW.shape)}"
        )
    if not scales_OG.dtype.is_floating_point or scales_OG.shape != (words_OW.shape[0], groups):
        raise ValueError(
            f"expected floating-point scales of shape ({words_OW.shape[0]}, {groups}), "
            f"got {scales_OG.dtype} {tuple(scales_OG.shape)}"
        )
    if scales_OG.device != words_OW.device:
        raise ValueError(f"words are on {words_OW.device}, scales on {scales_OG.device}: move them together")
    return stored
