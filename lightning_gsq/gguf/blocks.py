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
its codes and its scale change sign. Where no block type fits, a :func:`projection` rounds the dense weight anew.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.types.codec import decode as decode_stored
from lightning_gsq.gguf.types.level_bytes import encode_levels
from lightning_gsq.gguf.types.levels import GRIDS, LevelBlocks
from lightning_gsq.gguf.types.table import TYPES, GgmlType
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

Q1_0, Q2_0, Q4_0, Q5_0, Q8_0 = (TYPES[name] for name in ("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0"))
BLOCK_TYPES = {kind.name: kind for kind in (Q1_0, Q2_0, Q4_0, Q5_0, Q8_0)}
"""From the smallest to the largest."""


def exact_type(scheme: QuantScheme, in_features: int) -> GgmlType | None:
    """The smallest block type that holds such a weight without rounding, or None."""
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
