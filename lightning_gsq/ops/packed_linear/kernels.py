"""Triton kernels over packed codes, for CUDA; they also run in Triton's interpreter on a CPU.

A *unit* is the shortest run of whole words that holds whole values: one word where the width divides 32, else up to
seven (three words are 32 values of 3 bits). It lies in one group, as group lengths are multiples of 32. Every word is
loaded once; the loop over a unit's fields is unrolled, so that shifts and masks are constants, and field ``f`` of
all units in a tile meets the inputs ``x[f]`` of those units, which :func:`arrange` laid out beforehand (``F T U``:
field, token, unit).

Converting small integers to floating point would be an instruction a weight. Shifting the field to the top of an
fp32 mantissa under the exponent of 1 gives ``v = 1 + q / 2^bits`` with none, and the level is ``step (v - centre)``
with two constants of the width. One token: ``sum x v - centre sum x`` a unit in fp32, times scale and step. More
tokens: the scaled weight rounded to x's dtype, as the dense form has it, into tensor-core products, tokens on the
narrow side. Rows do not share sums, so results do not depend on scheduling.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_gsq.ops.packed_linear.tuning import Tile

ONE = 0x3F800000
"""The bits of 1.0, an argument of the kernels: as a constant, mask and exponent would take an instruction each."""


@triton.jit
def _arrange_kernel(
    x, arranged, sums, tokens, units, in_features, stride_t, stride_i, FIELDS: tl.constexpr, UNITS: tl.constexpr
):
    token = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    total = tl.zeros([UNITS], tl.float32)
    for field in tl.static_range(FIELDS):
        column = unit * FIELDS + field
        value = tl.load(x + token * stride_t + column * stride_i, mask=column < in_features, other=0.0)
        tl.store(arranged + (field * tokens + token) * units + unit, value)
        total += value.to(tl.float32)
    tl.store(sums + token * units + unit, total)


@triton.jit
def _fraction(low, high, one, POSITION: tl.constexpr, BITS: tl.constexpr):
    """``1 + q / 2^BITS`` of the value at this bit of ``low``, which may go on in ``high``."""
    base: tl.constexpr = 23 - BITS
    right: tl.constexpr = POSITION - base
    inside: tl.constexpr = min(BITS, 32 - POSITION)
    if right >= 0:
        field = low >> right
    else:
        field = low << -right
    field &= ((1 << inside) - 1) << base
    if inside < BITS:
        field |= (high << (base + inside)) & (((1 << BITS) - (1 << inside)) << base)
    return (field | one).to(tl.float32, bitcast=True)


@triton.jit
def _word(words, index, inside, count, stride, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(words + index * stride)
    return tl.load(words + index * stride, mask=inside & (index < count), other=0)


@triton.jit
def _gemv_kernel(
    arranged, sums, words, scales, bias, weight_of, y,
    tokens, rows, units, units_padded, word_count, units_per_group, one,
    stride_wo, stride_ww, stride_so, stride_sg,
    BITS: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    stored = row < rows
    row = tl.minimum(row, rows - 1)  # rows beyond the end repeat the last one: no masks on their loads
    stored_row = row
    if GROUPED:
        weight = tl.load(weight_of + token).to(tl.int64)
        stored_row += tl.maximum(weight, 0) * rows
        units = tl.where(weight >= 0, units, 0)  # a token of no weight gets zeros
    words_row = words + stored_row[:, None] * stride_wo
    scales_row = scales + stored_row[:, None] * stride_so
    total = tl.zeros([ROWS, UNITS], tl.float32)
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)
        index = (unit * WORDS)[None, :]
        inside = (unit < units)[None, :]
        low = _word(words_row, index, inside, word_count, stride_ww, EVEN)
        high = low
        part = tl.zeros([ROWS, UNITS], tl.float32)
        for field in tl.static_range(FIELDS):
            if field * BITS % 32 + BITS > 32:
                high = _word(words_row, index + (field * BITS // 32 + 1), inside, word_count, stride_ww, EVEN)
            x = tl.load(arranged + (field * tokens + token) * units_padded + unit).to(tl.float32)
            part += _fraction(low, high, one, field * BITS % 32, BITS) * x[None, :]
            if field * BITS % 32 + BITS > 32:
                low = high
        offset = CENTRE * tl.load(sums + token * units_padded + unit)
        scale = tl.load(scales_row + (unit // units_per_group)[None, :] * stride_sg, mask=inside, other=0.0)
        total += (part - offset[None, :]) * (scale.to(tl.float32) * STEP)
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(y + token * rows + row, result.to(y.dtype.element_ty), mask=stored)


@triton.jit
def _batch_kernel(
    arranged, words, scales, bias, weight_of, first_of, end_of, y,
    tokens, rows, units, units_padded, word_count, units_per_group, one,
    stride_wo, stride_ww, stride_so, stride_sg,
    BITS: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    stored = row < rows
    row = tl.minimum(row, rows - 1)
    stored_row = row
    if GROUPED:
        tile = tl.program_id(1)
        stored_row += tl.load(weight_of + tile).to(tl.int64) * rows
        first_token = tl.load(first_of + tile).to(tl.int64)
        end = tl.load(end_of + tile).to(tl.int64)
        token = first_token + tl.arange(0, TOKENS)
        present = token < end
        units = tl.where(first_token < end, units, 0)  # a tile without tokens does nothing
    else:
        token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        present = token < tokens
    words_row = words + stored_row[:, None] * stride_wo
    scales_row = scales + stored_row[:, None] * stride_so
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)
        index = (unit * WORDS)[None, :]
        inside = (unit < units)[None, :]
        low = _word(words_row, index, inside, word_count, stride_ww, EVEN)
        high = low
        scale = tl.load(scales_row + (unit // units_per_group)[None, :] * stride_sg, mask=inside, other=0.0)
        scale = scale.to(tl.float32) * STEP
        offset = scale * -CENTRE
        for field in tl.static_range(FIELDS):
            if field * BITS % 32 + BITS > 32:
                high = _word(words_row, index + (field * BITS // 32 + 1), inside, word_count, stride_ww, EVEN)
            pointer = arranged + (field * tokens + token[None, :]) * units_padded + unit[:, None]
            x = tl.load(pointer, mask=present[None, :], other=0.0)
            w = (_fraction(low, high, one, field * BITS % 32, BITS) * scale + offset).to(x.dtype)
            if UPCAST:
                total = tl.dot(w.to(tl.float32), x.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(w, x, total)
            if field * BITS % 32 + BITS > 32:
                low = high
    if HAS_BIAS:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    pointer = y + token[None, :] * rows + row[:, None]
    tl.store(pointer, total.to(y.dtype.element_ty), mask=stored[:, None] & present[None, :])


@triton.jit
def _dequantize_kernel(
    words, scales, w, rows, in_features, word_count, group_length,
    stride_wo, stride_ww, stride_so, stride_sg,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)[None, None] * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < in_features)
    index, shift = column * BITS // 32, column * BITS % 32
    pointer = words + row * stride_wo + index * stride_ww
    value = tl.load(pointer, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if 32 % BITS != 0:
        straddles = inside & (shift + BITS > 32) & (index + 1 < word_count)
        high = tl.load(pointer + stride_ww, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        value |= (high << (31 - shift).to(tl.uint32)) << 1
    level = ((value & ((1 << BITS) - 1)).to(tl.float32) * 2.0**-BITS + (1 - CENTRE)) * STEP
    scale = tl.load(scales + row * stride_so + (column // group_length) * stride_sg, mask=inside, other=0.0)
    tl.store(w + row * in_features + column, (level * scale.to(tl.float32)).to(w.dtype.element_ty), mask=inside)


def _constants(bits: int) -> dict[str, int | float]:
    """Words and values of a unit; the level of ``v = 1 + q / 2^bits`` is ``STEP (v - CENTRE)``."""
    words = bits // math.gcd(32, bits)
    step, centre = (4.0, 1.25) if bits == 1 else (2.0**bits, 1.5)
    return {"BITS": bits, "WORDS": words, "FIELDS": 32 * words // bits, "STEP": step, "CENTRE": centre}


def arrange(x_TI: Tensor, fields: int, multiple: int) -> tuple[Tensor, Tensor]:
    """The inputs as ``F T U`` and each unit's sum ``T U``; units padded with zeros to a multiple."""
    tokens, in_features = x_TI.shape
    units = -(-in_features // (fields * multiple)) * multiple
    arranged = torch.empty(fields, tokens, units, dtype=x_TI.dtype, device=x_TI.device)
    sums = torch.empty(tokens, units, dtype=torch.float32, device=x_TI.device)
    block = min(multiple, 128)
    _arrange_kernel[(units // block, tokens)](
        x_TI, arranged, sums, tokens, units, in_features, *x_TI.stride(), FIELDS=fields, UNITS=block
    )
    return arranged, sums


def linear(
    x_TI: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    bias_O: Tensor | None,
    *,
    bits: int,
    group_length: int,
    tile: Tile,
) -> Tensor:
    """``x w^T + bias``."""
    (tokens, in_features), (rows, word_count) = x_TI.shape, words_OW.shape
    constants = _constants(bits)
    fields, words = int(constants["FIELDS"]), int(constants["WORDS"])
    arranged, sums = arrange(x_TI, fields, tile.units)
    units, padded = -(-in_features // fields), arranged.shape[-1]
    y_TO = torch.empty(tokens, rows, dtype=x_TI.dtype, device=x_TI.device)
    if bias_O is not None:
        bias_O = bias_O.contiguous()
    units_per_group = group_length // fields if group_length < in_features else units
    sizes = (tokens, rows, units, padded, word_count, units_per_group, ONE)
    even = padded == units and word_count == units * words
    options = {**constants, "HAS_BIAS": bias_O is not None, "GROUPED": False, "EVEN": even}
    options |= {"ROWS": tile.rows, "UNITS": tile.units}
    if tile.tokens == 1:
        _gemv_kernel[(triton.cdiv(rows, tile.rows), tokens)](
            arranged, sums, words_OW, scales_OG, bias_O, None, y_TO, *sizes,
            *words_OW.stride(), *scales_OG.stride(), **options, num_warps=tile.warps,
        )  # fmt: skip
    else:
        _batch_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.tokens))](
            arranged, words_OW, scales_OG, bias_O, None, None, None, y_TO, *sizes,
            *words_OW.stride(), *scales_OG.stride(),
            UPCAST=x_TI.dtype == torch.float32 or not x_TI.is_cuda, TOKENS=tile.tokens, **options,
            num_warps=tile.warps,
        )  # fmt: skip
    return y_TO


def dequantize(
    words_OW: Tensor, scales_OG: Tensor, *, bits: int, in_features: int, group_length: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight ``O I``, computed in fp32 and rounded once."""
    rows, word_count = words_OW.shape
    w_OI = torch.empty(rows, in_features, dtype=dtype, device=words_OW.device)
    constants = {key: value for key, value in _constants(bits).items() if key not in ("WORDS", "FIELDS")}
    grid = (triton.cdiv(rows, 4), triton.cdiv(in_features, 512))
    _dequantize_kernel[grid](
        words_OW, scales_OG, w_OI, rows, in_features, word_count, group_length,
        *words_OW.stride(), *scales_OG.stride(), **constants, ROWS=4, COLUMNS=512, num_warps=4,
    )  # fmt: skip
    return w_OI
