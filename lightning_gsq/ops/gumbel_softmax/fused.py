"""The sampling op with its gradient written out, as one pass over the logits in each direction.

Forward and backward are plain functions of tiles ``L R C`` (levels, rows, the columns of one group), which
``torch.compile`` turns into one loop each: C++ on a CPU, Triton on CUDA. Nothing is stored between the passes but the
inputs: the backward pass draws the noise again from its counter. Without a compiler the same functions run as they
are, a slice at a time so that temporaries stay in the cache, some five times slower.

With ``r = dloss/dw``, ``p`` the probabilities and ``m = sum_l p_l v_l``:
``dlogit_l = r * s * (kappa / tau) * p_l * (v_l - m)`` and ``dscale = sum over the group of r * (base + m)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gsq.ops.gumbel_softmax.noise import counters, seed_words, uniform
from lightning_gsq.system.compiling import compile_function, compiler_available

Backend = Literal["auto", "triton", "compile", "eager"]
SLICE_ELEMENTS = 1 << 16
"""Logits that the uncompiled form handles at once."""


def resolve(backend: str, logits_LOI: Tensor) -> str:
    """The form that runs: "auto" is the first of "triton", "compile" and "eager" that works for these logits here."""
    if backend != "auto":
        return backend
    if not compiler_available(logits_LOI.device.type):
        return "eager"
    return "triton" if logits_LOI.is_cuda and logits_LOI.dtype != torch.float64 else "compile"


@functools.cache
def level_tensor(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The levels as fp32 on the device; a launch copies nothing."""
    return torch.tensor(levels or (0.0,), dtype=torch.float32, device=device)


def _relax(
    logits_LRC: Tensor, scalars: Tensor, seed: Tensor, row_stride: int, offset: int, levels: tuple[float, ...]
) -> tuple[list[Tensor], Tensor]:
    """Probabilities of each level (none for the binary form) and the expected level."""
    kappa, tau, noise = scalars[0], scalars[1], scalars[2]
    count, rows, columns = logits_LRC.shape
    position = (counters(rows, columns, row_stride, offset, logits_LRC.device) + seed[2]) * count
    if count == 1:
        u = uniform(position, seed).to(scalars.dtype)
        logistic = torch.log(u) - torch.log1p(-u)
        return [], torch.tanh((2 * kappa * logits_LRC[0].to(scalars.dtype) + noise * logistic) / (2 * tau))
    z = []
    for level in range(count):
        u = uniform(position + level, seed).to(scalars.dtype)
        z.append((kappa * logits_LRC[level].to(scalars.dtype) - noise * torch.log(-torch.log(u))) / tau)
    top = functools.reduce(torch.maximum, z)
    e = [torch.exp(part - top) for part in z]
    total = sum(e[1:], e[0])
    p = [part / total for part in e]
    return p, sum((p_l * v_l for p_l, v_l in zip(p[1:], levels[1:], strict=True)), p[0] * levels[0])


def _forward(
    logits_LRC: Tensor,
    scales_R: Tensor,
    base_RC: Tensor | None,
    scalars: Tensor,
    seed: Tensor,
    row_stride: int,
    offset: int,
    levels: tuple[float, ...],
) -> Tensor:
    _, mean_RC = _relax(logits_LRC, scalars, seed, row_stride, offset, levels)
    if base_RC is not None:
        mean_RC = mean_RC + base_RC
    return (mean_RC * scales_R[:, None]).to(logits_LRC.dtype)


def _backward(
    r_RC: Tensor,
    logits_LRC: Tensor,
    scales_R: Tensor,
    base_RC: Tensor | None,
    scalars: Tensor,
    seed: Tensor,
    row_stride: int,
    offset: int,
    levels: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    p, mean_RC = _relax(logits_LRC, scalars, seed, row_stride, offset, levels)
    r_RC = r_RC.to(scalars.dtype)
    value_RC = mean_RC if base_RC is None else mean_RC + base_RC
    d_scales_R = (r_RC * value_RC).sum(1).to(scales_R.dtype)
    r_RC = r_RC * scales_R[:, None] * (scalars[0] / scalars[1])
    if not p:
        return (r_RC * (1 - mean_RC * mean_RC))[None].to(logits_LRC.dtype), d_scales_R
    d_logits = [r_RC * p_l * (v_l - mean_RC) for p_l, v_l in zip(p, levels, strict=True)]
    return torch.stack(d_logits).to(logits_LRC.dtype), d_scales_R


def _sliced_forward(logits_LRC: Tensor, scales_R: Tensor, base_RC: Tensor | None, *rest: Any) -> Tensor:
    parts = []
    for rows, tail in _slices(logits_LRC, rest):
        parts.append(_forward(logits_LRC[:, rows], scales_R[rows], None if base_RC is None else base_RC[rows], *tail))
    return torch.cat(parts)


def _sliced_backward(
    r_RC: Tensor, logits_LRC: Tensor, scales_R: Tensor, base_RC: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    parts = []
    for rows, tail in _slices(logits_LRC, rest):
        base = None if base_RC is None else base_RC[rows]
        parts.append(_backward(r_RC[rows], logits_LRC[:, rows], scales_R[rows], base, *tail))
    d_logits, d_scales = zip(*parts, strict=True)
    return torch.cat(d_logits, dim=1), torch.cat(d_scales)


def _slices(logits_LRC: Tensor, rest: tuple[Any, ...]) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Slices of rows, and the last arguments of the functions above with the slice's own offset."""
    scalars, seed, row_stride, offset, levels = rest
    count, rows, columns = logits_LRC.shape
    step = max(1, SLICE_ELEMENTS // (count * columns))
    for start in range(0, rows, step):
        yield slice(start, start + step), (scalars, seed, row_stride, offset + start * row_stride, levels)


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return compile_function(_forward, dynamic=True), compile_function(_backward, dynamic=True)


def _functions(backend: str, logits_LOI: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if resolve(backend, logits_LOI) == "compile":
        return _compiled()
    return _sliced_forward, _sliced_backward


Tile = tuple[Tensor, Tensor, Tensor | None, int, int]
"""Logits ``L R C``, scales ``R``, base codes ``R C`` or None, row stride, offset of the first column."""


def _tiles(logits_LOI: Tensor, scales_OG: Tensor, base_OI: Tensor | None, group_length: int) -> list[Tile]:
    """One tile of ``O G`` rows where groups divide the columns, else one a group."""
    count, _, columns = logits_LOI.shape
    if columns % group_length == 0:
        base = None if base_OI is None else base_OI.reshape(-1, group_length)
        return [(logits_LOI.reshape(count, -1, group_length), scales_OG.reshape(-1), base, group_length, 0)]
    return [
        (
            logits_LOI[..., start : start + group_length],
            scales_OG[:, group],
            None if base_OI is None else base_OI[:, start : start + group_length],
            columns,
            start,
        )
        for group, start in enumerate(range(0, columns, group_length))
    ]


def forward(
    logits_LOI: Tensor,
    scales_OG: Tensor,
    base_OI: Tensor | None,
    levels: tuple[float, ...],
    numbers: Tensor,
    words: Tensor,
    group_length: int,
    backend: str,
) -> Tensor:
    """Samples the weight; see the module's docstring."""
    run, _ = _functions(backend, logits_LOI)
    parts = [
        run(tile, scales, base, numbers, words, stride, offset, levels)
        for tile, scales, base, stride, offset in _tiles(logits_LOI, scales_OG, base_OI, group_length)
    ]
    return parts[0].view(logits_LOI.shape[1:]) if len(parts) == 1 else torch.cat(parts, dim=1)


def backward(
    r_OI: Tensor,
    logits_LOI: Tensor,
    scales_OG: Tensor,
    base_OI: Tensor | None,
    levels: tuple[float, ...],
    numbers: Tensor,
    words: Tensor,
    group_length: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The exact gradient; see the module's docstring."""
    _, run = _functions(backend, logits_LOI)
    tiles = _tiles(logits_LOI, scales_OG, base_OI, group_length)
    r_parts = [r_OI.reshape(-1, group_length)] if len(tiles) == 1 else r_OI.split(group_length, dim=1)
    parts = [
        run(r, tile, scales, base, numbers, words, stride, offset, levels)
        for r, (tile, scales, base, stride, offset) in zip(r_parts, tiles, strict=True)
    ]
    if len(parts) == 1:
        d_logits, d_scales = parts[0]
        return d_logits.view(logits_LOI.shape), d_scales.view(scales_OG.shape)
    d_logits, d_scales = zip(*parts, strict=True)
    return torch.cat(d_logits, dim=-1), torch.stack(d_scales, dim=1)


def numbers_of(
    scalars: tuple[float, float, float], seed: int, like: Tensor, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """kappa, tau and the noise's factor, and the seed's words, as tensors: changing values compile nothing anew."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    words = seed_words(seed, first_row * like.shape[-1])
    return torch.tensor(scalars, dtype=dtype, device=like.device), words.to(like.device)
