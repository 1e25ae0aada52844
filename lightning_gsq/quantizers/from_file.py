"""The start from a GGUF file: its own codes and scales, to be refined and written back as the same type.

A file that people deploy already has a grid and a layout of scales: Q4_0 is -8 ... 7 in groups of 32, Q4_K 0 ... 15
with two-level scales and offsets, and so on. With this start, the block phase moves codes to neighbouring levels and
trains the scales against the full-precision model that ``--model.pretrained`` names; the export then writes the same
types, with everything else copied from the file. Of an I-type (IQ3_XXS ...), it moves code vectors to near ones. With
``rounding`` only the types are the file's, and another start finds codes and scales.
``--model.scheme file`` names the types of a file of several (:mod:`lightning_gsq.commands.file_types`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import Q1_0, Q2_0, Q4_0, Q5_0, Q8_0, tensor_of
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.layout import architecture_name
from lightning_gsq.gguf.names import Names
from lightning_gsq.gguf.rows import Place, places_in_file, to_model, verify_shapes
from lightning_gsq.gguf.types.codec import decode, verify_finite
from lightning_gsq.gguf.types.levels import LevelBlocks
from lightning_gsq.gguf.types.table import BY_NUMBER, TYPES, GgmlType
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


ROUNDS_NOTHING = "model.warm_start.rounding: FromFile rounds nothing; name LeastSquares, or null"


class FromFile(WarmStart):
    """Codes and scales of a GGUF file of the same model.

    Args:
        file: A file with the weights in types that have a preset (Q4_K, IQ4_NL, Q8_0 ...); ``--model.scheme file``
            takes them as they are there.
        rounding: Finds codes and scales anew in the file's types, such as ``LeastSquares``; null takes those of the
            file.

    Raises:
        ConfigurationError: there is no such file, it cannot be read, or ``rounding`` is a start from a file too.
    """

    def __init__(self, file: str, rounding: WarmStart | None = None) -> None:
        if isinstance(rounding, FromFile):
            raise ConfigurationError(ROUNDS_NOTHING)
        self.rounding = rounding
        self.needs_hessian = rounding is not None and rounding.needs_hessian
        self.diagonal_only = rounding is not None and rounding.diagonal_only
        self.following = None if rounding is None else rounding.following
        try:
            self.file = GGUFFile(Path(file).expanduser())
            self.names = Names(architecture_name(self.file), self._numbers("block_count")[0])
        except ConfigurationError as error:
            reason = str(error).removeprefix("format: gguf: ").removeprefix("model.warm_start.file: ")
            raise ConfigurationError(f"model.warm_start.file: {reason}") from None
        self.heads = {*self._numbers("attention.head_count"), *self._numbers("attention.head_count_kv")}

    @property
    def rule(self) -> WarmStart:
        """See :attr:`WarmStart.rule`."""
        return self if self.rounding is None else self.rounding

    def check(self, weights: Mapping[str, tuple[QuantScheme, tuple[int, int]]]) -> None:
        """Verifies that the file holds every weight in its scheme, and that ``rounding`` can find codes for it.

        Raises:
            ConfigurationError: it does not.
        """
        for name, (scheme, shape) in weights.items():
            self._stored(name, scheme, shape)
        if self.rounding is not None:
            self.rounding.check(weights)

    def types(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """ggml's name of the type in which the file has each weight, such as Q4_K, F16 or MXFP4; given its ``(O, I)``.

        Raises:
            ConfigurationError: the file does not hold a weight of that shape, or its parts in several types.
        """
        return {name: self._type(name, shape)[1] for name, shape in shapes.items()}

    def start(self, name: str, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """The codes and scales of one weight; its position is where the full-precision weight lies on that grid."""
        if self.rounding is not None:
            return self.rounding.start(name, w_OI, hessian_II, scheme)
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
        """With ``rounding`` alone: what a file has is found by the weight's name; see :meth:`start`."""
        if self.rounding is not None:
            return self.rounding(w_OI, hessian_II, scheme)
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
        stored_names, type_name = self._type(name, shape)
        said = f"model.warm_start.file: {stored_names[0]} is stored as {type_name}"
        if type_name.lower() not in GGML:
            raise ConfigurationError(
                f"{said}, whose weights cannot be refined; leave it out with --model.exclude. What can be are "
                f"{', '.join(GGML)}"
            )
        kind = TYPES[type_name]
        if scheme not in (QuantScheme(preset=type_name), SCHEMES.get(kind.number)):
            raise ConfigurationError(
                f"{said}, the run's is {scheme}; use --model.scheme file, which takes every weight as the file has it, "
                "without --model.overrides for this one, or leave it out with --model.exclude"
            )
        return stored_names, kind

    def _type(self, name: str, shape: tuple[int, int]) -> tuple[list[str], str]:
        """The tensors that hold a weight, and ggml's name of their type."""
        try:
            stored_names = self.names.of(name, self.file.tensors)
        except ConfigurationError:
            raise ConfigurationError(
                f"model.warm_start.file: {self.file.path} has no name for the parameter {name}: its architecture is "
                f"{self.names.architecture}; give a file of this model, or leave the weight out with --model.exclude"
            ) from None
        try:
            verify_shapes(self.file, stored_names, shape)
        except ConfigurationError as error:
            raise ConfigurationError(f"model.warm_start.file: {error}") from None
        numbers = [self.file.tensors[stored].number for stored in stored_names]
        kinds = [BY_NUMBER[n].name if n in BY_NUMBER else gguf.GGMLQuantizationType(n).name for n in numbers]
        if len(set(kinds)) > 1:
            raise ConfigurationError(
                f"model.warm_start.file: {' and '.join(stored_names)} are one matrix of the model and stored as "
                f"{' and '.join(kinds)}; leave {name.removesuffix('.weight')} out with --model.exclude"
            )
        return stored_names, kinds[0]


def start_file(settings: Mapping[str, Any]) -> Path | None:
    """The file of the start :class:`FromFile` in a run's settings of the model; None for a run with another start.

    Args:
        settings: As plain data.
    """
    start = settings.get("warm_start")
    if not isinstance(start, Mapping) or str(start.get("class_path", "")).rpartition(".")[2] != FromFile.__name__:
        return None
    return Path(start["init_args"]["file"]).expanduser()
