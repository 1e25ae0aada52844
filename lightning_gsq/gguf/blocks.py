"""Quantized tensors as ggml blocks: which block type holds a scheme exactly, and the bytes.

Of ggml's types (:mod:`lightning_gsq.gguf.types.table`), these have one fp16 scale ``d`` a block and evenly spaced
levels, as a scheme with flat groups has:

| type | weights | value of a weight |
|------|---------|-------------------|
| Q1_0 | 128     | -d, d             |
| Q2_0 | 64      | -d ... 2 d        |
| Q4_0 | 32      | -8 d ... 7 d      |
| Q5_0 | 32      | -16 d ... 15 d    |
| Q8_0 | 32      | -128 d ... 127 d  |

Nothing is rounded: where the group size is a multiple of the block's length (or one group covers the row), every block
lies within one group and ``d`` is the group's scale. Q2_0 reaches from -1 to 2 and a 2-bit weight from -2 to 1, so that
its codes and its scale change sign. A scheme with a preset of ggml's is stored in the type of that name, its numbers
as they are (:func:`blocks_of`, :func:`tensor_of`), levels and code vectors alike; one with an offset a group, at up to
5 bits, in Q4_1 or Q5_1. Where no block type fits, a :func:`projection` rounds the dense weight anew.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.types.codec import decode as decode_stored
from lightning_gsq.gguf.types.codec import encode as encode_stored
from lightning_gsq.gguf.types.level_bytes import encode_levels
from lightning_gsq.gguf.types.levels import GRIDS, LevelBlocks
from lightning_gsq.gguf.types.table import TYPES, GgmlType
from lightning_gsq.gguf.types.vectors import VectorBlocks
from lightning_gsq.weights.layout import FLOATS, OFFSETS, SCALES, SUB_OFFSETS, SUB_SCALES
from lightning_gsq.weights.presets import Preset, preset_named
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.vector_grid import VectorGrid

Q1_0, Q2_0, Q4_0, Q5_0, Q8_0 = (TYPES[name] for name in ("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0"))
BLOCK_TYPES = {kind.name: kind for kind in (Q1_0, Q2_0, Q4_0, Q5_0, Q8_0)}
"""From the smallest to the largest."""


def exact_type(scheme: QuantScheme, in_features: int) -> GgmlType | None:
    """The smallest block type that holds such a weight without rounding, or None."""
    if scheme.preset is not None:
        return _type_of_preset(preset_named(scheme.preset), in_features)
    for kind in BLOCK_TYPES.values():
        if kind is Q1_0 and scheme.bits != 1:
            continue  # Q1_0 has no zero between its ends
        mirrored = kind is Q2_0 and scheme.bits == 2
        low, high = (-scheme.high, -scheme.low) if mirrored else (scheme.low, scheme.high)
        whole = in_features % kind.length == 0
        aligned = scheme.num_groups(in_features) == 1 or scheme.group_length(in_features) % kind.length == 0
        levels = GRIDS[kind.name].levels
        if levels[0] <= low and high <= levels[-1] and whole and aligned:
            return kind
    return None


def encode(tensor: QuantizedTensor, kind: GgmlType) -> np.ndarray:
    """The bytes of a weight in a type that holds it exactly.

    Args:
        tensor: The weight.
        kind: As :func:`exact_type` gives it.

    Returns:
        uint8, ``O row_bytes``.

    Raises:
        ConfigurationError: a scale is no fp16 number.
        ValueError: the type does not hold this scheme.
    """
    columns = tensor.shape[1]
    if tensor.scheme.preset is not None:
        return encode_stored(blocks_of(tensor, kind))
    if exact_type(tensor.scheme, columns) is None or columns % kind.length:
        raise ValueError(f"{kind.name} does not hold rows of {columns} weights at {tensor.scheme}")
    codes_OI, scales_OG = tensor.codes_OI.cpu().to(torch.int16), fp16_scales(tensor.scales_OG)
    if kind is Q2_0 and tensor.scheme.bits == 2:
        codes_OI, scales_OG = -codes_OI, -scales_OG
    low, step, high = _spacing(kind)
    if codes_OI.numel() and not (low <= int(codes_OI.min()) and int(codes_OI.max()) <= high):
        raise ValueError(f"{kind.name} holds {low} ... {high}, got codes of {tensor.scheme}")
    blocks_per_group = max(1, tensor.scheme.group_length(columns) // kind.length)
    d_OB = scales_OG.repeat_interleave(blocks_per_group, dim=1)[:, : columns // kind.length]
    return encode_levels(LevelBlocks(kind, (codes_OI - low) // step, d_OB))


def blocks_of(tensor: QuantizedTensor, kind: GgmlType) -> LevelBlocks | VectorBlocks:
    """A weight with a preset as the blocks of a type that holds it exactly.

    Args:
        tensor: The weight.
        kind: As :func:`exact_type` gives it.

    Raises:
        ValueError: the type does not hold this scheme.
    """
    columns, tensor = tensor.shape[1], tensor.cpu()
    if exact_type(tensor.scheme, columns) is not kind:
        raise ValueError(f"{kind.name} does not hold rows of {columns} weights at {tensor.scheme}")
    grid, parts = tensor.scheme.grid, tensor.scale_parts
    if isinstance(grid, VectorGrid):
        index_OV, marks = grid.split(tensor.codes_OI)
        d_OB = fp16_scales(parts[SCALES])
        if grid.vectors.shift_group:
            return VectorBlocks(kind, index_OV, d_OB, parts[SUB_SCALES], down_OS=marks)
        return VectorBlocks(kind, index_OV, d_OB, parts[SUB_SCALES], negative_OI=marks)
    groups = 1 if SUB_SCALES in parts else tensor.scheme.group_length(columns) // kind.length
    floats = {name: fp16_scales(parts[name]).repeat_interleave(groups, dim=1) for name in FLOATS if name in parts}
    codes_OI = (tensor.codes_OI.to(torch.int16) - grid.low) // grid.step
    offsets_OB = floats.get(OFFSETS)
    dmin_OB = None if offsets_OB is None else -offsets_OB
    return LevelBlocks(kind, codes_OI, floats[SCALES], parts.get(SUB_SCALES), dmin_OB, parts.get(SUB_OFFSETS))


def tensor_of(blocks: LevelBlocks | VectorBlocks) -> QuantizedTensor:
    """Inverse of :func:`blocks_of`: the blocks as a weight with the preset of their type."""
    scheme = QuantScheme(preset=blocks.kind.name.lower())
    grid = scheme.grid
    if isinstance(blocks, VectorBlocks):
        assert isinstance(grid, VectorGrid)
        marks = blocks.negative_OI if blocks.down_OS is None else blocks.down_OS
        assert marks is not None
        codes_OI = grid.join(blocks.index_OV, marks)
        return QuantizedTensor(codes_OI, blocks.d_OB, scheme, {SUB_SCALES: blocks.s_OG.to(torch.int16)})
    codes_OI = (grid.step * blocks.codes_OI.to(torch.int16) + grid.low).to(grid.code_dtype)
    integers = {SUB_SCALES: blocks.sc_OG, SUB_OFFSETS: blocks.m_OG}
    others = {name: value.to(torch.int16) for name, value in integers.items() if value is not None}
    if blocks.dmin_OB is not None:
        others[OFFSETS] = -blocks.dmin_OB
    return QuantizedTensor(codes_OI, blocks.d_OB, scheme, others)


def _type_of_preset(preset: Preset, in_features: int) -> GgmlType | None:
    """The preset's own type, or one whose offset a block it can take."""
    names = ("Q4_1", "Q5_1") if preset.ggml is None else (preset.ggml,)
    for kind in (TYPES[name] for name in names):
        whole = in_features % kind.length == 0 and preset.group_size % min(kind.length, preset.group_size) == 0
        if whole and (preset.ggml is not None or len(preset.grid.levels) <= len(GRIDS[kind.name].levels)):
            return kind
    return None


def decode(raw: np.ndarray, kind: GgmlType) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`encode`, up to the sign of a mirrored grid.

    Args:
        raw: uint8, ``O row_bytes``.
        kind: The blocks' type.

    Returns:
        The multiples of ``d`` as int16 ``O I``, and ``d`` as fp16 ``O G`` with one entry a block.

    Raises:
        ValueError: the rows are no whole blocks.
    """
    stored = decode_stored(raw, kind)
    assert isinstance(stored, LevelBlocks)
    low, step, _ = _spacing(kind)
    return stored.codes_OI.to(torch.int16) * step + low, stored.d_OB


def projection(w_OI: Tensor, kind: GgmlType) -> np.ndarray:
    """The bytes of a dense weight rounded to a type's own grid, with llama.cpp's rounding.

    Args:
        w_OI: Dense weight, its rows whole blocks.
        kind: Q4_0, Q5_0 or Q8_0.

    Returns:
        uint8, ``O row_bytes``.
    """
    packed: np.ndarray = gguf.quants.quantize(w_OI.float().numpy(), gguf.GGMLQuantizationType[kind.name])
    return packed


def fp16_scales(scales: Tensor) -> Tensor:
    """The scales in fp16, if that changes none of them.

    Raises:
        ConfigurationError: it would.
    """
    half = scales.cpu().half()
    if not torch.equal(half.float(), scales.cpu().float()):
        raise ConfigurationError(
            f"export: this format stores scales in float16, and some of the run's {scales.dtype} scales are no float16 "
            "numbers; quantize with --model.scale_dtype float16, or export to native or dequantized"
        )
    return half


def _spacing(kind: GgmlType) -> tuple[int, int, int]:
    """The lowest level, the distance between two, and the highest."""
    levels = GRIDS[kind.name].levels
    return levels[0], levels[1] - levels[0], levels[-1]
