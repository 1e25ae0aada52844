"""The sampling op in Triton, for CUDA; it also runs in Triton's interpreter on a CPU.

A program works on whole groups, in chunks of columns where a group is long, so that a scale's gradient is one sum and
one store: no atomics, and nothing depends on scheduling. Noise comes from the same counter and hash as in
``noise.py``. In base 2 the constants of ``(kappa l - noise log(-log u)) / tau`` cancel within the softmax:
``t_l = (kappa log2(e) l - noise log2(-log2 u)) / tau``, ``p = 2^(t - max t)``.

The hardware's logarithm has an absolute error near 2^-22, which is as large as ``-log2 u`` itself where u is near 1:
there, and only there, a series takes its place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

COLUMNS = 512
"""Columns of a chunk at most; groups up to this long take one chunk."""
ELEMENTS = 1024
"""Weights of a chunk."""
WARPS = 4

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _uniform(counter, seed):
    low = tl.load(seed).to(tl.uint32, bitcast=True)
    high = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    bits = _hash(_hash(counter ^ low) ^ high)
    return ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _counter(offset, seed, LEVELS: tl.constexpr):
    return (offset.to(tl.uint32) + tl.load(seed + 2).to(tl.uint32, bitcast=True)) * LEVELS


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def _minus_log2(u, FAST: tl.constexpr):
    """``-log2 u``, with a small relative error up to the end of (0, 1)."""
    v = 1.0 - u
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * 0.2)))) * _LOG2_E
    return tl.where(v < 0.03125, series, -_log2(u, FAST))


@triton.jit
def _slopes(numbers):
    """How much a logit and a draw of noise weigh in the exponent."""
    inverse = 1.0 / tl.load(numbers + 1)
    return tl.load(numbers) * _LOG2_E * inverse, tl.load(numbers + 2) * inverse


@triton.jit
def _perturbed(logits, slope, noise, counter, seed, inside, FAST: tl.constexpr):
    logit = tl.load(logits, mask=inside, other=0.0).to(tl.float32)
    return slope * logit - noise * _log2(_minus_log2(_uniform(counter, seed), FAST), FAST)


@triton.jit
def _relax(logits, plane, numbers, levels, counter, seed, inside, LEVELS: tl.constexpr, FAST: tl.constexpr):
    """Unnormalised probabilities, one over their sum, and the expected level."""
    slope, noise = _slopes(numbers)
    t = ()
    for level in tl.static_range(LEVELS):
        t = t + (_perturbed(logits + level * plane, slope, noise, counter + level, seed, inside, FAST),)  # noqa: RUF005
    top = t[0]
    for level in tl.static_range(1, LEVELS):
        top = tl.maximum(top, t[level])
    e = ()
    for level in tl.static_range(LEVELS):
        e = e + (tl.exp2(t[level] - top),)  # noqa: RUF005
    total = e[0]
    mean = e[0] * tl.load(levels)
    for level in tl.static_range(1, LEVELS):
        total += e[level]
        mean += e[level] * tl.load(levels + level)
    inverse = 1.0 / total
    return e, inverse, mean * inverse


@triton.jit
def _binary(logits, numbers, counter, seed, inside, FAST: tl.constexpr):
    """``tanh y`` and ``1 - tanh^2 y``, both without cancellation."""
    slope, noise = _slopes(numbers)
    logit = tl.load(logits, mask=inside, other=0.0).to(tl.float32)
    u = _uniform(counter, seed)
    logistic = _minus_log2(1.0 - u, FAST) - _minus_log2(u, FAST)
    y2 = 2.0 * slope * logit + noise * logistic
    e = tl.exp2(-tl.abs(y2))
    inverse = 1.0 / (1.0 + e)
    magnitude = (1.0 - e) * inverse
    return tl.where(y2 < 0, -magnitude, magnitude), 4.0 * e * inverse * inverse


@triton.jit
def _place(groups, columns, group_length, tiles, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Group index, offset of each weight in its plane, its column in the group, and whether it exists."""
    tile = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, group = tile // groups, tile % groups
    within = first + tl.arange(0, COLUMNS)
    column = group[:, None] * group_length + within[None, :]
    inside = (tile < tiles)[:, None] & (within < group_length)[None, :] & (column < columns)
    return tile, row[:, None] * columns + column, inside


@triton.jit
def _forward_kernel(
    logits, scales, base, levels, numbers, seed, w, tiles, groups, columns, group_length, plane,
    LEVELS: tl.constexpr, HAS_BASE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    for first in range(0, group_length, COLUMNS):
        tile, offset, inside = _place(groups, columns, group_length, tiles, first, ROWS, COLUMNS)
        counter = _counter(offset, seed, LEVELS)
        scale = tl.load(scales + tile, mask=tile < tiles, other=0.0).to(tl.float32)[:, None]
        if LEVELS == 1:
            value, _ = _binary(logits + offset, numbers, counter, seed, inside, FAST)
        else:
            _, _, value = _relax(logits + offset, plane, numbers, levels, counter, seed, inside, LEVELS, FAST)
        if HAS_BASE:
            value += tl.load(base + offset, mask=inside, other=0).to(tl.float32)
        tl.store(w + offset, (value * scale).to(w.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    r, logits, scales, base, levels, numbers, seed, d_logits, d_scales, tiles, groups, columns, group_length, plane,
    LEVELS: tl.constexpr, HAS_BASE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ratio = tl.load(numbers) / tl.load(numbers + 1)
    d_scale = tl.zeros([ROWS], tl.float32)
    for first in range(0, group_length, COLUMNS):
        tile, offset, inside = _place(groups, columns, group_length, tiles, first, ROWS, COLUMNS)
        counter = _counter(offset, seed, LEVELS)
        scale = tl.load(scales + tile, mask=tile < tiles, other=0.0).to(tl.float32)[:, None]
        upstream = tl.load(r + offset, mask=inside, other=0.0).to(tl.float32)
        factor = upstream * scale * ratio
        if LEVELS == 1:
            mean, slope = _binary(logits + offset, numbers, counter, seed, inside, FAST)
            tl.store(d_logits + offset, (factor * slope).to(d_logits.dtype.element_ty), mask=inside)
        else:
            e, inverse, mean = _relax(
                logits + offset, plane, numbers, levels, counter, seed, inside, LEVELS, FAST
            )  # fmt: skip
            factor *= inverse
            for level in tl.static_range(LEVELS):
                gradient = factor * e[level] * (tl.load(levels + level) - mean)
                pointer = d_logits + level * plane + offset
                tl.store(pointer, gradient.to(d_logits.dtype.element_ty), mask=inside)
        if HAS_BASE:
            mean += tl.load(base + offset, mask=inside, other=0).to(tl.float32)
        d_scale += tl.sum(upstream * mean, axis=1)
    tile = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(d_scales + tile, d_scale.to(d_scales.dtype.element_ty), mask=tile < tiles)


def forward(
    logits_LOI: Tensor, scales_OG: Tensor, base_OI: Tensor | None, levels: Tensor, numbers: Tensor, seed: Tensor,
    group_length: int,
) -> Tensor:  # fmt: skip
    """The sampled weight in the logits' dtype; ``levels``, ``numbers`` (kappa, tau, noise) fp32, on the device."""
    logits_LOI, scales_OG = logits_LOI.contiguous(), scales_OG.contiguous()
    base_OI = None if base_OI is None else base_OI.contiguous()
    w_OI = torch.empty(logits_LOI.shape[1:], dtype=logits_LOI.dtype, device=logits_LOI.device)
    grid, sizes, options = _launch(logits_LOI, scales_OG, base_OI, group_length)
    _forward_kernel[grid](logits_LOI, scales_OG, base_OI, levels, numbers, seed, w_OI, *sizes, **options)
    return w_OI


def backward(
    r_OI: Tensor, logits_LOI: Tensor, scales_OG: Tensor, base_OI: Tensor | None, levels: Tensor, numbers: Tensor,
    seed: Tensor, group_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of logits and scales."""
    logits_LOI, scales_OG, r_OI = logits_LOI.contiguous(), scales_OG.contiguous(), r_OI.contiguous()
    base_OI = None if base_OI is None else base_OI.contiguous()
    d_logits_LOI, d_scales_OG = torch.empty_like(logits_LOI), torch.empty_like(scales_OG)
    grid, sizes, options = _launch(logits_LOI, scales_OG, base_OI, group_length)
    _backward_kernel[grid](
        r_OI, logits_LOI, scales_OG, base_OI, levels, numbers, seed, d_logits_LOI, d_scales_OG, *sizes, **options
    )
    return d_logits_LOI, d_scales_OG


def _launch(
    logits_LOI: Tensor, scales_OG: Tensor, base_OI: Tensor | None, group_length: int
) -> tuple[tuple[int], tuple[int, ...], dict[str, int | bool]]:
    count, _, columns = logits_LOI.shape
    tiles, groups = scales_OG.numel(), scales_OG.shape[1]
    chunk = min(COLUMNS, triton.next_power_of_2(group_length))
    rows = max(1, ELEMENTS // chunk)
    options = {"LEVELS": count, "HAS_BASE": base_OI is not None, "FAST": logits_LOI.is_cuda}
    return (
        (triton.cdiv(tiles, rows),),
        (tiles, groups, columns, group_length, logits_LOI[0].numel()),
        {**options, "ROWS": rows, "COLUMNS": chunk, "num_warps": WARPS},
    )
