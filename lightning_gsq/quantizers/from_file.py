"""The start from a GGUF file: its own codes and scales, to be refined and written back as the same type.

A file that people deploy already has a grid and a layout of scales: Q4_0 is -8 ... 7 in groups of 32, Q4_K 0 ... 15
with two-level scales and offsets, and so on. With this start, the block phase moves codes to neighbouring levels and
trains the scales against the full-precision model that ``--model.pretrained`` names; the export then writes the same
types, with everything else copied from the file. Of an I-type (IQ3_XXS ...), it moves code vectors to near ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import Q1_0, Q2_0, Q4_0, Q5_0, Q8_0, tensor_of
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.layout import architecture_name
from lightning_gsq.gguf.names import Names
from lightning_gsq.gguf.rows import Place, places_in_file, to_model, verify_shapes
from lightning_gsq.gguf.types.codec import decode, verify_finite
from lightning_gsq.gguf.types.levels import LevelBlocks
from lightning_gsq.gguf.types.table import TYPES, GgmlType
from lightning_gsq.gguf.types.vectors import VectorBlocks
from lightning_gsq.quantizers.warm_start import Start, WarmStart, start_at
from lightning_gsq.weights.presets import GGML
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

SCHEMES = {
    Q1_0.number: QuantScheme(1, 128),
    Q2_0.number: QuantScheme(2, 64),
    Q4_0.number: QuantScheme(4, 32),
    Q5_0.number: QuantScheme(5, 32),
    Q8_0.number: QuantScheme(8, 32),
}
"""The scheme whose grid and groups a block type has, by the type's number; its preset is another."""
PRESET_TYPES = {TYPES[preset.ggml].number: TYPES[preset.ggml] for preset in GGML.values() if preset.ggml is not None}
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
        try:
            self.file = GGUFFile(Path(file).expanduser())
            self.names = Names(architecture_name(self.file), self._numbers("block_count")[0])
        except ConfigurationError as error:
            reason = str(error).removeprefix("format: gguf: ").removeprefix("model.warm_start.file: ")
            raise ConfigurationError(f"model.warm_start.file: {reason}") from None
        self.heads = {*self._numbers("attention.head_count"), *self._numbers("attention.head_count_kv")}

    def check(self, weights: Mapping[str, tuple[QuantScheme, tuple[int, int]]]) -> None:
        """Verifies that the file holds every weight in its scheme.

        Raises:
            ConfigurationError: it does not.
        """
        kinds = {name: self._kind(name, shape)[1] for name, (_, shape) in weights.items()}
        for name, (scheme, shape) in weights.items():
            try:
                self._stored(name, scheme, shape)
            except ConfigurationError as error:
                if len(set(kinds.values())) == 1:
                    raise
                raise ConfigurationError(f"{error}. All types of the file are {options_of(kinds)}") from None

    def start(self, name: str, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """The codes and scales of one weight; its position is where the full-precision weight lies on that grid."""
        stored_names, kind = self._stored(name, scheme, (w_OI.shape[0], w_OI.shape[1]))
        places = places_in_file(self.file, stored_names, w_OI.cpu(), self.heads, same=False)
        return start_at(self._tensor(stored_names, places, kind, scheme), w_OI)

    def _tensor(
        self, stored_names: list[str], places: Sequence[Place], kind: GgmlType, scheme: QuantScheme
    ) -> QuantizedTensor:
        """What the file holds, its rows in the model's order."""
        stored = []
        for name, place in zip(stored_names, places, strict=True):
            blocks = decode(self.file.raw(place.name), kind)
            assert isinstance(blocks, LevelBlocks | VectorBlocks)
            verify_finite(blocks, f"model.warm_start.file: {self.file.path}: {name}")
            stored.append(tensor_of(blocks))
        codes_OI, scales_OG = (
            to_model(places, parts)
            for parts in ([piece.codes_OI for piece in stored], [piece.scales_OG for piece in stored])
        )
        others = {part: to_model(places, [piece.others[part] for piece in stored]) for part in stored[0].others}
        if scheme.preset is None and kind is Q2_0:  # -1 ... 2 as -2 ... 1
            return QuantizedTensor(-codes_OI, -scales_OG, scheme)
        return QuantizedTensor(codes_OI, scales_OG, stored[0].scheme, others)

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """Not possible without the weight's name; see :meth:`start`."""
        raise TypeError("FromFile needs the name of the weight: call start(name, w_OI, hessian_II, scheme)")

    def _numbers(self, key: str) -> list[int]:
        """An entry of the architecture: one number, or one a block."""
        field = self.file.fields.get(f"{architecture_name(self.file)}.{key}")
        value = None if field is None else field.value
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if not numbers:
            raise ConfigurationError(f"model.warm_start.file: {self.file.path} has no number in an entry {key}")
        return numbers

    def _stored(self, name: str, scheme: QuantScheme, shape: tuple[int, int]) -> tuple[list[str], GgmlType]:
        """The tensors that hold a weight, and their type, which is the scheme's."""
        stored_names, kind = self._kind(name, shape)
        preset, plain = QuantScheme(preset=kind.name.lower()), SCHEMES.get(kind.number)
        if scheme not in (preset, plain):
            way = f"--model.scheme {preset.preset}"
            if plain is not None:
                way += f" (or --model.scheme.bits {plain.bits} --model.scheme.group_size {plain.group_size})"
            raise ConfigurationError(
                f"model.warm_start.file: {stored_names[0]} is stored as {kind.name}, the run's is {scheme}; use {way}, "
                f'name it for some weights with --model.overrides \'{{"PATTERN": "{preset.preset}"}}\', or leave it '
                "out with --model.exclude"
            )
        return stored_names, kind

    def _kind(self, name: str, shape: tuple[int, int]) -> tuple[list[str], GgmlType]:
        """The tensors that hold a weight, and their type."""
        stored_names = self.names.of(name, self.file.tensors)
        try:
            verify_shapes(self.file, stored_names, shape)
        except ConfigurationError as error:
            raise ConfigurationError(f"model.warm_start.file: {error}") from None
        numbers = {self.file.tensors[stored].number for stored in stored_names}
        number = numbers.pop()
        kind = PRESET_TYPES.get(number)
        if kind is None or numbers:
            raise ConfigurationError(
                f"model.warm_start.file: {stored_names[0]} is stored in ggml's type {number}, whose grid is not one of "
                f"this project's; those are {', '.join(other.name for other in PRESET_TYPES.values())}. Leave it out "
                "with --model.exclude"
            )
        return stored_names, kind


def options_of(kinds: Mapping[str, GgmlType]) -> str:
    """The options that name the types of weights: the most common one, and the others by patterns."""
    names = {name: kind.name.lower() for name, kind in kinds.items()}
    (usual, _), *_ = Counter(names.values()).most_common(1)
    endings: dict[str, set[str]] = {}
    for name, type_name in names.items():
        endings.setdefault(_ending(name), set()).add(type_name)
    overrides: dict[str, str] = {}
    for name, type_name in names.items():
        if type_name != usual:
            alike = len(endings[_ending(name)]) == 1
            overrides[f"*.{_ending(name)}" if alike else name.removesuffix(".weight")] = type_name
    return f"--model.scheme {usual} --model.overrides '{json.dumps(overrides)}'"


def _ending(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
