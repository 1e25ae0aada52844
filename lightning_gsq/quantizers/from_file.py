"""The start from a GGUF file: its own codes and scales, to be refined and written back as the same type.

A file that people deploy already has a grid and a layout of scales: Q4_0 is -8 ... 7 in groups of 32, Q4_K 0 ... 15
with two-level scales and offsets, and so on. With this start, the block phase moves codes to neighbouring levels and
trains the scales against the full-precision model that ``--model.pretrained`` names; the export then writes the same
types, with everything else copied from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import Q1_0, Q2_0, Q4_0, Q5_0, Q8_0, tensor_of
from lightning_gsq.gguf.file import GGUFFile, StoredTensor
from lightning_gsq.gguf.names import ARCHITECTURES, Layout
from lightning_gsq.gguf.types.codec import decode as decode_stored
from lightning_gsq.gguf.types.codec import verify_finite
from lightning_gsq.gguf.types.levels import LevelBlocks
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.quantizers.warm_start import Start, WarmStart
from lightning_gsq.weights.layout import SCALES
from lightning_gsq.weights.presets import GGML
from lightning_gsq.weights.quantized import QuantizedTensor, expand_groups
from lightning_gsq.weights.scheme import QuantScheme

SCHEMES = {
    Q1_0.number: QuantScheme(1, 128),
    Q2_0.number: QuantScheme(2, 64),
    Q4_0.number: QuantScheme(4, 32),
    Q5_0.number: QuantScheme(5, 32),
    Q8_0.number: QuantScheme(8, 32),
}
"""The scheme whose grid and groups a block type has, by the type's number; its preset is another."""
LEVEL_TYPES = {TYPES[preset.ggml].number: TYPES[preset.ggml] for preset in GGML.values() if preset.ggml is not None}
"""Types that have a preset, by number."""


class FromFile(WarmStart):
    """Codes and scales of a GGUF file of the same model.

    Args:
        file: A file with the weights in types that have a preset (Q4_K, IQ4_NL, Q8_0 ...), which ``--model.scheme`` and
            ``--model.overrides`` have to name.

    Raises:
        ConfigurationError: there is no such file, or it cannot be read.
    """

    def __init__(self, file: str) -> None:
        self.needs_hessian = False
        self.file = GGUFFile(Path(file).expanduser())
        architecture = self._field("general.architecture")
        if architecture not in ARCHITECTURES.values():
            raise ConfigurationError(
                f"model.warm_start.file: {file} is of the architecture {architecture}; read are "
                f"{', '.join(sorted(set(ARCHITECTURES.values())))}"
            )
        heads = self._field(f"{architecture}.attention.head_count")
        kv_heads = self._field(f"{architecture}.attention.head_count_kv")
        self.layout = Layout(architecture, self._field(f"{architecture}.block_count"), heads, kv_heads)

    def check(self, weights: Mapping[str, tuple[QuantScheme, tuple[int, int]]]) -> None:
        """Verifies that the file holds every weight in its scheme.

        Raises:
            ConfigurationError: it does not.
        """
        for name, (scheme, shape) in weights.items():
            self._stored(name, scheme, shape)

    def start(self, name: str, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """The codes and scales of one weight; its position is where the full-precision weight lies on that grid."""
        stored_name, stored = self._stored(name, scheme, (w_OI.shape[0], w_OI.shape[1]))
        kind = LEVEL_TYPES[stored.number]
        blocks = decode_stored(self.file.raw(stored_name), kind)
        assert isinstance(blocks, LevelBlocks)
        verify_finite(blocks, f"model.warm_start.file: {self.file.path}: {stored_name}")
        tensor = tensor_of(blocks)
        if scheme.preset is None and kind is Q2_0:  # -1 ... 2 as -2 ... 1
            tensor = QuantizedTensor(-tensor.codes_OI, -tensor.scales_OG, scheme)
        rows = self.layout.rows_of(stored_name, len(tensor.codes_OI))
        if rows is not None:
            order = rows.argsort()
            tensor = tensor.map(lambda part: part[order])
        tensor = tensor.map(lambda part: part.to(w_OI.device))
        parts = {part: value.float() for part, value in tensor.scale_parts.items()}
        layout, length = tensor.scheme.layout, tensor.group_length
        s_OI = expand_groups(layout.scales(parts), w_OI.shape[1], length)
        o_OG = layout.offsets(parts)
        lifted_OI = w_OI if o_OG is None else w_OI - expand_groups(o_OG, w_OI.shape[1], length)
        # A group of zeros has a scale of zero: its weights lie on any of its levels.
        codes_OI = tensor.codes_OI.float()
        position_OI = torch.where(s_OI == 0, codes_OI, tensor.scheme.grid.coordinate(lifted_OI / s_OI))
        return Start(tensor.codes_OI, parts.pop(SCALES), position_OI, parts)

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """Not possible without the weight's name; see :meth:`start`."""
        raise TypeError("FromFile needs the name of the weight: call start(name, w_OI, hessian_II, scheme)")

    def _field(self, key: str) -> Any:
        if key not in self.file.fields:
            raise ConfigurationError(f"model.warm_start.file: {self.file.path} has no entry {key}")
        return self.file.fields[key].value

    def _stored(self, name: str, scheme: QuantScheme, shape: tuple[int, int]) -> tuple[str, StoredTensor]:
        stored_name = self.layout.name_of(name)
        stored = self.file.tensors.get(stored_name)
        if stored is None or stored.shape != shape:
            found = "no such tensor" if stored is None else f"the shape {stored.shape}"
            raise ConfigurationError(
                f"model.warm_start.file: {self.file.path} has {found} for {name} ({stored_name}, {shape}): it is a "
                "file of another model"
            )
        kind = LEVEL_TYPES.get(stored.number)
        if kind is None:
            raise ConfigurationError(
                f"model.warm_start.file: {stored_name} is stored in ggml's type {stored.number}, whose grid is not one "
                f"of this project's; those are {', '.join(other.name for other in LEVEL_TYPES.values())}. Leave it out "
                "with --model.exclude"
            )
        preset, plain = QuantScheme(preset=kind.name.lower()), SCHEMES.get(stored.number)
        if scheme not in (preset, plain):
            way = f"--model.scheme {preset.preset}"
            if plain is not None:
                way += f" (or --model.scheme.bits {plain.bits} --model.scheme.group_size {plain.group_size})"
            raise ConfigurationError(
                f"model.warm_start.file: {stored_name} is stored as {kind.name}, the run's is {scheme}; use {way}, "
                f'name it for some weights with --model.overrides \'{{"PATTERN": "{preset.preset}"}}\', or leave it '
                "out with --model.exclude"
            )
        return stored_name, stored
