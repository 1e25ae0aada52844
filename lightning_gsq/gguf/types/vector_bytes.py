"""The bytes of types of vectors (:mod:`lightning_gsq.gguf.types.vectors`), read and written.

The parts of a block of 256 weights, in their order; numbers are of bytes:

| type    | parts                                                                                              |
|---------|----------------------------------------------------------------------------------------------------|
| IQ2_XXS | d 2, for 32 weights each: four indices 4, four sign patterns of 7 bits and s in 4 bits of a word 4 |
| IQ2_XS  | d 2, words of 9 bits of index and 7 of signs 64, s 8                                               |
| IQ2_S   | d 2, indices 32, signs 32, two more bits of each index 8, s 8                                      |
| IQ3_XXS | d 2, indices 64, for 32 weights each: four sign patterns and s as in IQ2_XXS 32                    |
| IQ3_S   | d 2, indices 64, one more bit of each index 8, signs 32, s 4                                       |
| IQ1_S   | d 2, indices 32, for 32 weights each: 3 more bits of each of four indices, s, the shift 16         |
| IQ1_M   | indices 32, 3 more bits and the shift of each index 16, four words of four s and four bits of d 8  |

A sign pattern of 7 bits has the eighth bit that makes the number of minus signs even.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lightning_gsq.gguf.types.bits import pack, unpack
from lightning_gsq.gguf.types.parts import fp16_bytes, fp16_tensor, whole_blocks, whole_numbers
from lightning_gsq.gguf.types.table import GgmlType
from lightning_gsq.gguf.types.vectors import VectorBlocks
from lightning_gsq.weights.code_vectors import VECTORS

Parts = dict[str, np.ndarray]
"""``d``: bytes ``O B 2``; ``index``, ``s``, ``negative`` and ``down`` as in VectorBlocks, ``O B n``."""
_SEVENS = np.array([0, 7, 14, 21], np.uint32)
_THREES = np.array([0, 3, 6, 9], np.uint16)
_SHIFTS_OF_D = np.array([12, 8, 4, 0], np.uint16)


def decode_vectors(raw: np.ndarray, kind: GgmlType) -> VectorBlocks:
    """The structure of bytes.

    Args:
        raw: uint8, ``O row_bytes``, whole blocks.
        kind: One of :data:`~lightning_gsq.weights.code_vectors.VECTORS`.
    """
    rows = len(raw)
    parts = _LAYOUTS[kind.name][0](np.ascontiguousarray(raw.reshape(rows, -1, kind.num_bytes)))

    def tensor(name: str, dtype: type) -> torch.Tensor | None:
        return torch.from_numpy(parts[name].astype(dtype).reshape(rows, -1)) if name in parts else None

    index, s = tensor("index", np.int16), tensor("s", np.int8)
    assert index is not None and s is not None
    return VectorBlocks(kind, index, fp16_tensor(parts["d"]), s, tensor("negative", np.bool_), tensor("down", np.bool_))


def encode_vectors(blocks: VectorBlocks) -> np.ndarray:
    """Inverse of :func:`decode_vectors`.

    Returns:
        uint8, ``O row_bytes``.

    Raises:
        ValueError: an index or ``s`` is none of the type's, the signs are not such as it holds, or shapes do not fit.
    """
    kind, grid = blocks.kind, blocks.grid
    rows, vectors = blocks.index_OV.shape
    columns = vectors * grid.length
    count = whole_blocks(kind, columns)
    parts: Parts = {
        "d": fp16_bytes("d", blocks.d_OB, rows, count),
        "index": whole_numbers("index", blocks.index_OV, (0, grid.count - 1), (rows, vectors), count),
        "s": whole_numbers("s", blocks.s_OG, (0, grid.high), (rows, columns // grid.group), count),
    }
    if grid.signs != "none":
        parts["negative"] = whole_numbers("negative", blocks.negative_OI, (0, 1), (rows, columns), count)
    if grid.signs == "even" and (parts["negative"].reshape(-1, 8).sum(axis=-1) % 2).any():
        raise ValueError(f"{kind.name} holds an even number of minus signs among eight weights, got an odd one")
    if grid.shift_group:
        parts["down"] = whole_numbers("down", blocks.down_OS, (0, 1), (rows, columns // grid.shift_group), count)
    return np.concatenate(_LAYOUTS[kind.name][1](parts), axis=-1).reshape(rows, -1)


def _signs(seven: np.ndarray) -> np.ndarray:
    """Eight bits, ``O B 8n``, of patterns of seven, ``O B n``."""
    seven = seven.astype(np.uint8)
    odd = unpack(seven[..., None], 1, 1).sum(axis=-1, dtype=np.uint8) & np.uint8(1)
    return unpack(seven | odd << np.uint8(7), 1, 1)


def _sevens(negative: np.ndarray) -> np.ndarray:
    """Inverse of :func:`_signs`."""
    return pack(negative, 1, 1) & np.uint8(127)


def _words(data: np.ndarray, form: str) -> np.ndarray:
    return np.ascontiguousarray(data).view(form)


def _bytes(words: np.ndarray, form: str) -> np.ndarray:
    return np.ascontiguousarray(words.astype(form)).view(np.uint8)


def _signed_scales(words: np.ndarray) -> Parts:
    """Signs and ``s`` of words ``O B 8``: four patterns of seven bits, and four bits of ``s``."""
    sevens = words[..., None] >> _SEVENS & np.uint32(127)
    return {"negative": _signs(sevens.reshape(*words.shape[:-1], -1)), "s": words >> np.uint32(28)}


def _signed_scale_words(parts: Parts) -> np.ndarray:
    sevens = _sevens(parts["negative"]).astype(np.uint32)
    fours = sevens.reshape(*sevens.shape[:-1], -1, 4) << _SEVENS
    return np.bitwise_or.reduce(fours, axis=-1) | parts["s"].astype(np.uint32) << np.uint32(28)


def _read_iq2_xxs(data: np.ndarray) -> Parts:
    pairs = data[..., 2:].reshape(*data.shape[:-1], 8, 8)
    index = pairs[..., :4].reshape(*data.shape[:-1], -1)
    return {"d": data[..., :2], "index": index, **_signed_scales(_words(pairs[..., 4:], "<u4")[..., 0])}


def _write_iq2_xxs(parts: Parts) -> list[np.ndarray]:
    index = parts["index"].astype(np.uint8)
    fours = index.reshape(*index.shape[:-1], 8, 4)
    words = _bytes(_signed_scale_words(parts), "<u4").reshape(fours.shape)
    return [parts["d"], np.concatenate([fours, words], axis=-1).reshape(*index.shape[:-1], -1)]


def _read_iq2_xs(data: np.ndarray) -> Parts:
    words = _words(data[..., 2:66], "<u2")
    return {
        "d": data[..., :2],
        "index": words & np.uint16(511),
        "negative": _signs(words >> np.uint16(9)),
        "s": unpack(data[..., 66:], 4, 1),
    }


def _write_iq2_xs(parts: Parts) -> list[np.ndarray]:
    words = parts["index"].astype(np.uint16) | _sevens(parts["negative"]).astype(np.uint16) << np.uint16(9)
    return [parts["d"], _bytes(words, "<u2"), pack(parts["s"], 4, 1)]


def _read_iq2_s(data: np.ndarray) -> Parts:
    return {
        "d": data[..., :2],
        "index": data[..., 2:34] | unpack(data[..., 66:74], 2, 1).astype(np.uint16) << np.uint16(8),
        "negative": unpack(data[..., 34:66], 1, 1),
        "s": unpack(data[..., 74:], 4, 1),
    }


def _write_iq2_s(parts: Parts) -> list[np.ndarray]:
    index = parts["index"]
    low, high = (index & 255).astype(np.uint8), pack(index >> 8, 2, 1)
    return [parts["d"], low, pack(parts["negative"], 1, 1), high, pack(parts["s"], 4, 1)]


def _read_iq3_xxs(data: np.ndarray) -> Parts:
    return {"d": data[..., :2], "index": data[..., 2:66], **_signed_scales(_words(data[..., 66:], "<u4"))}


def _write_iq3_xxs(parts: Parts) -> list[np.ndarray]:
    return [parts["d"], parts["index"].astype(np.uint8), _bytes(_signed_scale_words(parts), "<u4")]


def _read_iq3_s(data: np.ndarray) -> Parts:
    return {
        "d": data[..., :2],
        "index": data[..., 2:66] | unpack(data[..., 66:74], 1, 1).astype(np.uint16) << np.uint16(8),
        "negative": unpack(data[..., 74:106], 1, 1),
        "s": unpack(data[..., 106:], 4, 1),
    }


def _write_iq3_s(parts: Parts) -> list[np.ndarray]:
    index = parts["index"]
    low, high = (index & 255).astype(np.uint8), pack(index >> 8, 1, 1)
    return [parts["d"], low, high, pack(parts["negative"], 1, 1), pack(parts["s"], 4, 1)]


def _read_iq1_s(data: np.ndarray) -> Parts:
    words = _words(data[..., 34:], "<u2")
    high = (words[..., None] >> _THREES & np.uint16(7)).reshape(*words.shape[:-1], -1)
    return {
        "d": data[..., :2],
        "index": data[..., 2:34] | high << np.uint16(8),
        "s": words >> np.uint16(12) & np.uint16(7),
        "down": words >> np.uint16(15),
    }


def _write_iq1_s(parts: Parts) -> list[np.ndarray]:
    index = parts["index"].astype(np.uint16)
    words = np.bitwise_or.reduce((index >> np.uint16(8)).reshape(*index.shape[:-1], -1, 4) << _THREES, axis=-1)
    words |= parts["s"].astype(np.uint16) << np.uint16(12) | parts["down"].astype(np.uint16) << np.uint16(15)
    return [parts["d"], (index & np.uint16(255)).astype(np.uint8), _bytes(words, "<u2")]


def _read_iq1_m(data: np.ndarray) -> Parts:
    fields = unpack(data[..., 32:48], 4, 1)
    words = _words(data[..., 48:], "<u2")
    d = np.bitwise_or.reduce((words & np.uint16(0xF000)) >> _SHIFTS_OF_D, axis=-1)
    return {
        "d": _bytes(d[..., None], "<u2"),
        "index": data[..., :32] | (fields & np.uint8(7)).astype(np.uint16) << np.uint16(8),
        "s": (words[..., None] >> _THREES & np.uint16(7)).reshape(*words.shape[:-1], -1),
        "down": fields >> np.uint8(3),
    }


def _write_iq1_m(parts: Parts) -> list[np.ndarray]:
    index = parts["index"]
    fields = (index >> 8).astype(np.uint8) | parts["down"].astype(np.uint8) << np.uint8(3)
    s = parts["s"].astype(np.uint16)
    words = np.bitwise_or.reduce(s.reshape(*s.shape[:-1], 4, 4) << _THREES, axis=-1)
    words |= _words(parts["d"], "<u2") << _SHIFTS_OF_D & np.uint16(0xF000)
    return [(index & 255).astype(np.uint8), pack(fields, 4, 1), _bytes(words, "<u2")]


_LAYOUTS: dict[str, tuple[Callable[[np.ndarray], Parts], Callable[[Parts], list[np.ndarray]]]] = {
    "IQ2_XXS": (_read_iq2_xxs, _write_iq2_xxs),
    "IQ2_XS": (_read_iq2_xs, _write_iq2_xs),
    "IQ2_S": (_read_iq2_s, _write_iq2_s),
    "IQ3_XXS": (_read_iq3_xxs, _write_iq3_xxs),
    "IQ3_S": (_read_iq3_s, _write_iq3_s),
    "IQ1_S": (_read_iq1_s, _write_iq1_s),
    "IQ1_M": (_read_iq1_m, _write_iq1_m),
}
"""How a block is read and written, by the type's name."""
assert set(_LAYOUTS) == set(VECTORS)
