"""Quantized tensors as ggml blocks: which block type holds a scheme exactly, and the bytes.

A ggml block is an fp16 scale ``d`` and the codes of some consecutive weights of a row:

| type | number | weights | bytes | value of code q          | where element j lies                                   |
|------|--------|---------|-------|--------------------------|--------------------------------------------------------|
| Q1_0 | 41     | 128     | 18    | +d if q else -d          | bit j % 8 of byte j / 8                                |
| Q2_0 | 42     | 64      | 18    | (q - 1) d, q in 0 ... 3  | bits 2 (j % 4) of byte j / 4                           |
| Q4_0 | 2      | 32      | 18    | (q - 8) d, q in 0 ... 15 | low half of byte j, and high half of byte j - 16       |
| Q5_0 | 6      | 32      | 22    | (q - 16) d, q in 0 ... 31| as Q4_0, the fifth bit in bit j of a word before them  |
| Q8_0 | 8      | 32      | 34    | q d, q signed            | byte j                                                 |

Nothing is rounded: where the group size is a multiple of the block's length (or one group covers the row), every block
lies within one group and ``d`` is the group's scale. Q2_0 reaches from -1 to 2 and a 2-bit weight from -2 to 1, so that
its codes and its scale change sign. Where no block type fits, a :func:`projection` rounds the dense weight anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

Q2_0_NUMBER = 42
"""The ``gguf`` package does not know this type."""
SCALE_BYTES = 2


@dataclass(frozen=True)
class BlockType:
    """A ggml block type.

    Args:
        name: As llama.cpp calls it.
        number: As it stands in a file.
        length: Weights in a block.
        num_bytes: Bytes of a block.
        low: Smallest multiple of ``d``.
        high: Largest multiple of ``d``.
    """

    name: str
    number: int
    length: int
    num_bytes: int
    low: int
    high: int

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row of ``in_features`` weights, which are whole blocks."""
        return in_features // self.length * self.num_bytes


Q1_0 = BlockType("Q1_0", 41, 128, 18, -1, 1)
Q2_0 = BlockType("Q2_0", Q2_0_NUMBER, 64, 18, -1, 2)
Q4_0 = BlockType("Q4_0", 2, 32, 18, -8, 7)
Q5_0 = BlockType("Q5_0", 6, 32, 22, -16, 15)
Q8_0 = BlockType("Q8_0", 8, 32, 34, -128, 127)
BLOCK_TYPES = {kind.name: kind for kind in (Q1_0, Q2_0, Q4_0, Q5_0, Q8_0)}
"""From the smallest to the largest."""


def exact_type(scheme: QuantScheme, in_features: int) -> BlockType | None:
    """The smallest block type that holds such a weight without rounding, or None."""
    for kind in BLOCK_TYPES.values():
        if kind is Q1_0 and scheme.bits != 1:
            continue  # Q1_0 has no zero between its ends
        mirrored = kind is Q2_0 and scheme.bits == 2
        low, high = (-scheme.high, -scheme.low) if mirrored else (scheme.low, scheme.high)
        whole = in_features % kind.length == 0
        aligned = scheme.num_groups(in_features) == 1 or scheme.group_length(in_features) % kind.length == 0
        if kind.low <= low and high <= kind.high and whole and aligned:
            return kind
    return None


def encode(tensor: QuantizedTensor, kind: BlockType) -> np.ndarray:
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
    rows, columns = tensor.shape
    if exact_type(tensor.scheme, columns) is None or columns % kind.length:
        raise ValueError(f"{kind.name} does not hold rows of {columns} weights at {tensor.scheme}")
    codes = tensor.codes_OI.cpu().numpy().astype(np.int16)
    scales = fp16_scales(tensor.scales_OG).numpy()
    if kind is Q2_0 and tensor.scheme.bits == 2:
        codes, scales = -codes, -scales
    if codes.min(initial=0) < kind.low or codes.max(initial=0) > kind.high:
        raise ValueError(f"{kind.name} holds {kind.low} ... {kind.high}, got codes of {tensor.scheme}")
    blocks_per_group = max(1, tensor.scheme.group_length(columns) // kind.length)
    d = np.repeat(scales, blocks_per_group, axis=1)[:, : columns // kind.length]
    q = codes.reshape(rows, -1, kind.length)
    parts = [np.ascontiguousarray(d, "<f2")[..., None].view(np.uint8), *_pack(q, kind)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def decode(raw: np.ndarray, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`encode`, up to the sign of a mirrored grid.

    Args:
        raw: uint8, ``O row_bytes``.
        kind: The blocks' type.

    Returns:
        The multiples of ``d`` as int16 ``O I``, and ``d`` as fp16 ``O G`` with one entry a block.

    Raises:
        ValueError: the rows are no whole blocks.
    """
    if raw.dtype != np.uint8 or raw.ndim != 2 or raw.shape[1] % kind.num_bytes:
        raise ValueError(
            f"expected rows of {kind.num_bytes}-byte {kind.name} blocks, got {raw.dtype} of shape {raw.shape}"
        )
    blocks = raw.reshape(len(raw), -1, kind.num_bytes)
    d = np.ascontiguousarray(blocks[..., :SCALE_BYTES]).view("<f2")[..., 0].astype(np.float16)
    q = _unpack(blocks[..., SCALE_BYTES:], kind)
    return torch.from_numpy(q.reshape(len(raw), -1)), torch.from_numpy(d)


def dequantize(raw: np.ndarray, number: int) -> Tensor:
    """The dense fp32 values ``O I`` of the bytes of any type that this module or the ``gguf`` package knows.

    Args:
        raw: uint8, ``O row_bytes``.
        number: ggml's number of the type.
    """
    for kind in BLOCK_TYPES.values():
        if kind.number == number:
            q_OI, d_OG = decode(raw, kind)
            return q_OI.float() * d_OG.float().repeat_interleave(kind.length, dim=1)
    values = gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType(number))
    return torch.from_numpy(np.array(values, np.float32))


def projection(w_OI: Tensor, kind: BlockType) -> np.ndarray:
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


def _pack(q: np.ndarray, kind: BlockType) -> list[np.ndarray]:
    """Codes ``O G length`` as the bytes after the scale."""
    half = kind.length // 2
    if kind is Q1_0:
        return [np.packbits(q > 0, axis=-1, bitorder="little")]
    if kind is Q2_0:
        fours = (q + 1).astype(np.uint8).reshape(*q.shape[:-1], -1, 4)
        return [fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6]
    if kind is Q8_0:
        return [q.astype(np.int8).view(np.uint8)]
    unsigned = (q - kind.low).astype(np.uint8)
    low = unsigned & 15
    nibbles = low[..., :half] | low[..., half:] << 4
    if kind is Q4_0:
        return [nibbles]
    return [np.packbits(unsigned >> 4, axis=-1, bitorder="little"), nibbles]


def _unpack(data: np.ndarray, kind: BlockType) -> np.ndarray:
    """Inverse of :func:`_pack`: int16 multiples of ``d``, ``O G length``."""
    if kind is Q1_0:
        return 2 * np.unpackbits(data, axis=-1, bitorder="little").astype(np.int16) - 1
    if kind is Q2_0:
        fours = np.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
        return fours.reshape(*data.shape[:-1], -1).astype(np.int16) - 1
    if kind is Q8_0:
        return np.ascontiguousarray(data).view(np.int8).astype(np.int16)
    nibbles = data[..., -kind.length // 2 :]
    unsigned = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.int16)
    if kind is Q5_0:
        unsigned |= np.unpackbits(data[..., :4], axis=-1, bitorder="little").astype(np.int16) << 4
    return unsigned + kind.low
