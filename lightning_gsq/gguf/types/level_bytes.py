"""The bytes of types of levels (:mod:`lightning_gsq.gguf.types.levels`), read and written."""

from __future__ import annotations

import numpy as np
import torch

from lightning_gsq.gguf.types.bits import pack, pack_trits, unpack, unpack_trits
from lightning_gsq.gguf.types.levels import GRIDS, LevelBlocks
from lightning_gsq.gguf.types.parts import fp16_bytes, fp16_tensor, whole_blocks, whole_numbers
from lightning_gsq.gguf.types.table import GgmlType

_SCALE_BYTES = {"Q2_K": 16, "Q3_K": 12, "Q4_K": 12, "Q5_K": 12, "Q6_K": 16, "IQ4_XS": 6}
_TRITS = ((32, 5, 32), (16, 5, 16), (4, 4, 4))
"""Of TQ1_0: bytes of a part, base-3 digits of a byte, bytes of a run."""


def decode_levels(raw: np.ndarray, kind: GgmlType) -> LevelBlocks:
    """The structure of bytes.

    Args:
        raw: uint8, ``O row_bytes``, whole blocks.
        kind: One of :data:`GRIDS`.
    """
    grid, rows = GRIDS[kind.name], len(raw)
    blocks = raw.reshape(rows, -1, kind.num_bytes)
    parts, begin = {}, 0
    for part in grid.parts.split():
        size = _part_bytes(kind, part)
        parts[part] = np.ascontiguousarray(blocks[..., begin : begin + size])
        begin += size
    sc, m = _unpack_scales(kind.name, parts["scales"]) if "scales" in parts else (None, None)
    dmin = parts.get("min")
    if dmin is not None and m is None:
        dmin = _negated(dmin)
    codes = _unpack_codes(kind, parts)
    return LevelBlocks(
        kind,
        torch.from_numpy(codes.reshape(rows, -1)),
        fp16_tensor(parts["d"]),
        None if sc is None else torch.from_numpy(sc.reshape(rows, -1)),
        None if dmin is None else fp16_tensor(dmin),
        None if m is None else torch.from_numpy(m.reshape(rows, -1)),
    )


def encode_levels(blocks: LevelBlocks) -> np.ndarray:
    """Inverse of :func:`decode_levels`.

    Returns:
        uint8, ``O row_bytes``.

    Raises:
        ValueError: a code, ``sc`` or ``m`` is none of the type's, or shapes do not fit together.
    """
    kind, grid = blocks.kind, blocks.grid
    rows, columns = blocks.codes_OI.shape
    count = whole_blocks(kind, columns)
    groups = count * kind.length // grid.group if grid.group else 0
    codes = whole_numbers("code", blocks.codes_OI, (0, len(grid.levels) - 1), (rows, columns), count)
    parts = _pack_codes(kind, codes)
    parts["d"] = fp16_bytes("d", blocks.d_OB, rows, count)
    if grid.sc is not None:
        sc = whole_numbers("sc", blocks.sc_OG, grid.sc, (rows, groups), count)
        m = None if grid.m is None else whole_numbers("m", blocks.m_OG, grid.m, (rows, groups), count)
        parts["scales"] = _pack_scales(kind.name, sc, m)
    if "min" in grid.parts.split():
        dmin = fp16_bytes("dmin", blocks.dmin_OB, rows, count)
        parts["min"] = _negated(dmin) if grid.m is None else dmin
    return np.concatenate([parts[part] for part in grid.parts.split()], axis=-1).reshape(rows, -1)


def _part_bytes(kind: GgmlType, part: str) -> int:
    if part in ("d", "min"):
        return 2
    if part == "scales":
        return _SCALE_BYTES[kind.name]
    if part == "codes":
        return sum(size for size, _, _ in _TRITS) if kind.name == "TQ1_0" else kind.length
    return kind.length * GRIDS[kind.name].planes[int(part)].bits // 8


def _unpack_codes(kind: GgmlType, parts: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 ``O B length``."""
    if kind.name == "TQ1_0":
        trits, begin = [], 0
        for size, digits, run in _TRITS:
            trits.append(unpack_trits(parts["codes"][..., begin : begin + size], digits, run))
            begin += size
        return np.concatenate(trits, axis=-1)
    if kind.name == "Q8_0":
        return parts["codes"] ^ np.uint8(128)  # from two's complement to a count from -128
    codes, shift = np.zeros(1, np.uint8), 0
    for number, plane in enumerate(GRIDS[kind.name].planes):
        codes = codes | unpack(parts[str(number)], plane.bits, plane.run) << np.uint8(shift)
        shift += plane.bits
    return codes


def _pack_codes(kind: GgmlType, codes: np.ndarray) -> dict[str, np.ndarray]:
    if kind.name == "TQ1_0":
        packed, begin = [], 0
        for size, digits, run in _TRITS:
            packed.append(pack_trits(codes[..., begin : begin + size * digits], digits, run))
            begin += size * digits
        return {"codes": np.concatenate(packed, axis=-1)}
    codes = codes.astype(np.uint8)
    if kind.name == "Q8_0":
        return {"codes": codes ^ np.uint8(128)}
    parts, shift = {}, 0
    for number, plane in enumerate(GRIDS[kind.name].planes):
        parts[str(number)] = pack(codes >> np.uint8(shift), plane.bits, plane.run)
        shift += plane.bits
    return parts


def _unpack_scales(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """``sc`` and ``m`` as int8 ``O B groups``."""
    if name == "Q2_K":
        both = unpack(data, 4, 16).astype(np.int8)
        return both[..., :16], both[..., 16:]
    if name == "Q6_K":
        return data.view(np.int8), None
    if name == "Q3_K":
        six = unpack(data[..., :8], 4, 8) | unpack(data[..., 8:], 2, 4) << np.uint8(4)
        return six.astype(np.int8) - np.int8(32), None
    if name == "IQ4_XS":
        six = unpack(data[..., 2:], 4, 1) | unpack(data[..., :2], 2, 1) << np.uint8(4)
        return six.astype(np.int8) - np.int8(32), None
    # Q4_K, Q5_K: the first four of sc and of m in six bits of a byte; of the last four, the two high bits there
    sc, m, low = data[..., :4], data[..., 4:8], data[..., 8:]
    return (
        np.concatenate([sc & 63, low & 15 | sc >> 6 << 4], axis=-1).astype(np.int8),
        np.concatenate([m & 63, low >> 4 | m >> 6 << 4], axis=-1).astype(np.int8),
    )


def _pack_scales(name: str, sc: np.ndarray, m: np.ndarray | None) -> np.ndarray:
    if name == "Q6_K":
        return sc.astype(np.int8).view(np.uint8)
    if name in ("Q3_K", "IQ4_XS"):
        six = (sc + 32).astype(np.uint8)
        low_run, high_run = (8, 4) if name == "Q3_K" else (1, 1)
        low, high = pack(six, 4, low_run), pack(six >> 4, 2, high_run)
        return np.concatenate([low, high] if name == "Q3_K" else [high, low], axis=-1)
    assert m is not None
    sc, m = sc.astype(np.uint8), m.astype(np.uint8)
    if name == "Q2_K":
        return pack(np.concatenate([sc, m], axis=-1), 4, 16)
    low = sc[..., 4:] & 15 | (m[..., 4:] & 15) << 4
    return np.concatenate([sc[..., :4] | sc[..., 4:] >> 4 << 6, m[..., :4] | m[..., 4:] >> 4 << 6, low], axis=-1)


def _negated(data: np.ndarray) -> np.ndarray:
    """Bytes of an fp16 number with the other sign."""
    return data ^ np.array([0, 128], np.uint8)
