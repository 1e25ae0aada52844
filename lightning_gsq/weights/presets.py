"""Schemes that have names: the types of ggml, the modes of MLX, and ``w3g64`` for any width and group.

A preset is data: a grid, a group size, a layout of scales, and whose file holds it without rounding. The types of ggml
round their floats to fp16, and their rows are whole blocks; where a row is none, llama.cpp takes another type, and so
does a run that asks for ``fallback``.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.code_vectors import VECTORS
from lightning_gsq.weights.grid import Bits, Grid, grid_of, table_grid, unsigned_grid
from lightning_gsq.weights.layout import Integers, ScaleLayout
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.vector_grid import EIGHTHS, vector_grid

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of IQ4_NL and IQ4_XS, from ggml's ``kvalues_iq4nl``."""
MLX_BITS, MLX_GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
"""What MLX computes rightly; 7 bits and other groups give wrong numbers there, without an error."""


@dataclass(frozen=True)
class Preset:
    """A scheme with a name.

    Args:
        name: In small letters.
        bits: Bits of a code, or "ternary".
        grid: The codes of a weight.
        group_size: Weights that share a scale; -1 for a row.
        layout: How scales are stored.
        multiple: Rows have to be a multiple of so many weights.
        fallback: The preset that llama.cpp's rule takes for other rows; None where it names none.
        ggml: The type of ggml that holds such a weight exactly; None for other presets.
    """

    name: str
    bits: Bits
    grid: Grid
    group_size: int
    layout: ScaleLayout
    multiple: int = 1
    fallback: str | None = None
    ggml: str | None = None


_HALF = ScaleLayout(dtype=torch.float16)
_AFFINE = ScaleLayout(offset=True, dtype=torch.float16)


def _ggml(
    name: str, grid: Grid, group: int, layout: ScaleLayout = _HALF, multiple: int = 0, fallback: str | None = None
) -> Preset:
    bits: Bits = "ternary" if len(grid.levels) == 3 else grid.storage_bits
    return Preset(name, bits, grid, group, layout, multiple or group, fallback, name.upper())


def _two_level(sub_scales: Integers, sub_offsets: Integers | None = None) -> ScaleLayout:
    return ScaleLayout(sub_offsets is not None, 256, sub_scales, sub_offsets, torch.float16)


def _vectors(name: str) -> Preset:
    vectors = VECTORS[name.upper()]
    unit = vectors.unit / EIGHTHS if vectors.shift_group else vectors.unit
    layout = ScaleLayout(block=256, sub_scales=Integers(0, vectors.high), dtype=torch.float16, odd_unit=unit)
    bits = int(name[2])  # of its name: a weight has no bits of its own
    return Preset(name, bits, vector_grid(vectors.name, bits), vectors.group, layout, 256, "iq4_nl", vectors.name)


_FOUR, _SIX, _SIGNED_SIX, _EIGHT = Integers(0, 15), Integers(0, 63), Integers(-32, 31), Integers(-128, 127)
_FROM_MINUS_ONE = Grid(-1, 2, storage_bits=2, origin=-1)
LEVEL_TYPES = {
    preset.name: preset
    for preset in (
        _ggml("q1_0", grid_of(1), 128),
        _ggml("q2_0", _FROM_MINUS_ONE, 64, fallback="q4_0"),
        _ggml("tq1_0", grid_of("ternary"), 256, fallback="q4_0"),
        _ggml("tq2_0", _FROM_MINUS_ONE, 256, fallback="q4_0"),
        _ggml("q2_k", unsigned_grid(2), 16, _two_level(_FOUR, _FOUR), 256, "q4_0"),
        _ggml("q3_k", grid_of(3), 16, _two_level(_SIGNED_SIX), 256, "q4_0"),
        _ggml("q4_k", unsigned_grid(4), 32, _two_level(_SIX, _SIX), 256, "q5_0"),
        _ggml("q5_k", unsigned_grid(5), 32, _two_level(_SIX, _SIX), 256, "q5_1"),
        _ggml("q6_k", grid_of(6), 16, _two_level(_EIGHT), 256, "q8_0"),
        _ggml("iq4_nl", table_grid(IQ4_VALUES), 32),
        _ggml("iq4_xs", table_grid(IQ4_VALUES), 32, _two_level(_SIGNED_SIX), 256, "iq4_nl"),
        _ggml("q4_0", grid_of(4), 32),
        _ggml("q4_1", unsigned_grid(4), 32, _AFFINE),
        _ggml("q5_0", grid_of(5), 32),
        _ggml("q5_1", unsigned_grid(5), 32, _AFFINE),
        _ggml("q8_0", grid_of(8), 32),
    )
}
"""The types of ggml whose weight is a scale times a level, less an offset."""
VECTOR_TYPES = {name.lower(): _vectors(name.lower()) for name in VECTORS}
"""Those whose weights have code vectors: training goes on from codes that are there, it finds none by rounding."""
GGML = {**LEVEL_TYPES, **VECTOR_TYPES}
"""Both."""
MLX = {
    f"mlx{bits}g{group}": Preset(f"mlx{bits}g{group}", bits, unsigned_grid(bits), group, _AFFINE, group)
    for bits in MLX_BITS
    for group in MLX_GROUPS
}
"""MLX's affine modes: a scale and an offset a group."""
NAMED = {**GGML, **MLX}
"""Presets that are more than a width and a group size."""
OF_FILE = "file"
"""In place of a preset in ``model.scheme``: each weight has the type that the file of the start ``FromFile`` has."""
_PLAIN = re.compile(r"w([1-8]|t)g([1-9]\d{0,6})(?:s([1-9]\d?)(?:b([2-8]))?)?")
SALIENT_BITS, SALIENT_TABLE = 4, 16
"""Bits of the salient columns of a name such as ``w1g64s10``, and distinct scales of the others at one bit."""


class PlainPreset(NamedTuple):
    """What a name such as ``w3g64`` or ``w1g64s10b4`` says.

    Args:
        bits: Bits a weight, or "ternary".
        group_size: Weights that share a scale.
        salient: The salient columns; None for none.
    """

    bits: Bits
    group_size: int
    salient: SalientPart | None = None

    @property
    def name(self) -> str:
        """The name."""
        name = f"w{'t' if self.bits == 'ternary' else self.bits}g{self.group_size}"
        if self.salient is None:
            return name
        bits = "" if self.salient.bits == SALIENT_BITS else f"b{self.salient.bits}"
        return f"{name}s{round(100 * (self.salient.ratio or 0))}{bits}"


@functools.cache
def plain_preset(name: str) -> PlainPreset | None:
    """Width and group size of a name such as ``w3g64`` (``wtg64`` is ternary); None for another kind of name.

    ``w1g64s10`` has a tenth of salient columns at 4 bits, ``w1g64s10b3`` at 3.
    """
    match = _PLAIN.fullmatch(name)
    if match is None:
        return None
    bits: Bits = "ternary" if match[1] == "t" else int(match[1])
    salient = None
    if match[3] is not None:
        table = SALIENT_TABLE if bits == 1 else None
        salient = SalientPart(
            "structured", int(match[4] or SALIENT_BITS), int(match[3]) / 100, "error", scale_groups=table
        )
    return PlainPreset(bits, int(match[2]), salient)


def is_name(name: str) -> bool:
    """Whether ``model.scheme`` takes this name: that of a preset, or the word for the types of a file."""
    return is_preset(name) or name == OF_FILE


def is_preset(name: str) -> bool:
    """Whether a scheme has this name."""
    return name in NAMED or plain_preset(name) is not None


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigurationError: there is none; the nearest is named where one is near, and all kinds are.
    """
    preset = NAMED.get(name)
    if preset is None and name == OF_FILE:
        raise ConfigurationError(
            "file stands for the types of --model.warm_start.file in --model.scheme alone; give the name of a preset"
        )
    if preset is None:
        plain = [f"w{bits}g{group}" for bits in (*range(1, 9), "t") for group in (32, 64, 128)]
        near = difflib.get_close_matches(name.lower(), [*NAMED, *plain], n=1, cutoff=0.6)
        meant = f"; the nearest is {near[0]}" if near else ""
        raise ConfigurationError(
            f"there is no preset {name!r}{meant}. There are w<bits>g<group size> (bits 1 to 8, or t for ternary; "
            f"s<percent> behind it for salient columns of {SALIENT_BITS} bits), mlx<bits>g<group size> (bits "
            f"{', '.join(map(str, MLX_BITS))}; groups of {', '.join(map(str, MLX_GROUPS))}), {', '.join(GGML)}"
        )
    return preset
