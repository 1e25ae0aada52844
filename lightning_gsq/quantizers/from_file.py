"""The start from a GGUF file: its own codes and scales, to be refined and written back as the same type.

A file that people deploy already has a grid: Q4_0 is -8 ... 7 in groups of 32, Q8_0 -128 ... 127 in groups of 32, and
so on. With this start, the block phase moves codes to neighbouring levels and trains the scales against the
full-precision model that ``--model.pretrained`` names; the export then writes the same types, with everything else
copied from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import BLOCK_TYPES, Q1_0, Q2_0, Q4_0, Q5_0, Q8_0, decode
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.layout import architecture_name
from lightning_gsq.gguf.names import Names
from lightning_gsq.gguf.rows import places_in_file, to_model, verify_shapes
from lightning_gsq.gguf.types.table import BY_NUMBER, GgmlType
from lightning_gsq.quantizers.warm_start import Start, WarmStart
from lightning_gsq.weights.scheme import QuantScheme

SCHEMES = {
    Q1_0.number: QuantScheme(1, 128),
    Q2_0.number: QuantScheme(2, 64),
    Q4_0.number: QuantScheme(4, 32),
    Q5_0.number: QuantScheme(5, 32),
    Q8_0.number: QuantScheme(8, 32),
}
"""The scheme whose grid and groups a block type has, by the type's number."""


class FromFile(WarmStart):
    """Codes and scales of a GGUF file of the same model.

    Args:
        file: A file with the weights in Q1_0, Q2_0, Q4_0, Q5_0 or Q8_0; ``--model.scheme`` has to be that type's.

    Raises:
        ConfigurationError: there is no such file, or it cannot be read.
    """

    def __init__(self, file: str) -> None:
        self.needs_hessian = False
        self.file = GGUFFile(Path(file).expanduser())
        self.names = Names(architecture_name(self.file), self._numbers("block_count")[0])
        self.heads = {*self._numbers("attention.head_count"), *self._numbers("attention.head_count_kv")}

    def check(self, weights: Mapping[str, tuple[QuantScheme, tuple[int, int]]]) -> None:
        """Verifies that the file holds every weight in its scheme.

        Raises:
            ConfigurationError: it does not.
        """
        for name, (scheme, shape) in weights.items():
            self._stored(name, scheme, shape)

    def start(self, name: str, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """The codes and scales of one weight; its position is where the full-precision weight lies on that grid."""
        stored_names, kind = self._stored(name, scheme, (w_OI.shape[0], w_OI.shape[1]))
        places = places_in_file(self.file, stored_names, w_OI.cpu(), self.heads, same=False)
        decoded = [decode(self.file.raw(place.name), kind) for place in places]
        codes_OI, scales_OG = (to_model(places, parts) for parts in zip(*decoded, strict=True))
        if kind is Q2_0:
            codes_OI, scales_OG = -codes_OI, -scales_OG
        scales_OG = scales_OG.float().to(w_OI.device)
        codes_OI = codes_OI.to(torch.int8).to(w_OI.device)
        spread_OI = scales_OG.repeat_interleave(kind.length, dim=1)
        # A block of zeros has a scale of zero: its weights lie on any of its levels.
        position_OI = torch.where(spread_OI == 0, codes_OI.float(), w_OI / spread_OI)
        return Start(codes_OI, scales_OG, position_OI)

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """Not possible without the weight's name; see :meth:`start`."""
        raise TypeError("FromFile needs the name of the weight: call start(name, w_OI, hessian_II, scheme)")

    def _numbers(self, key: str) -> list[int]:
        """An entry of the architecture: one number, or one a block."""
        field = self.file.fields.get(f"{architecture_name(self.file)}.{key}")
        value = None if field is None else field.value
        numbers = [own for own in (value if isinstance(value, list) else [value]) if isinstance(own, int)]
        if not numbers:
            raise ConfigurationError(f"model.warm_start.file: {self.file.path} has no number in an entry {key}")
        return numbers

    def _stored(self, name: str, scheme: QuantScheme, shape: tuple[int, int]) -> tuple[list[str], GgmlType]:
        """The tensors that hold a weight, and their type."""
        stored_names = self.names.of(name, self.file.tensors)
        try:
            verify_shapes(self.file, stored_names, shape)
        except ConfigurationError as error:
            raise ConfigurationError(f"model.warm_start.file: {error}") from None
        numbers = {self.file.tensors[stored].number for stored in stored_names}
        number = numbers.pop()
        own = SCHEMES.get(number)
        if own is None or numbers:
            raise ConfigurationError(
                f"model.warm_start.file: {stored_names[0]} is stored in ggml's type {number}, whose grid is not one of "
                f"this project's; those are {', '.join(BLOCK_TYPES)}. Leave it out with --model.exclude"
            )
        if own != scheme:
            raise ConfigurationError(
                f"model.warm_start.file: {stored_names[0]} is stored as {own}, the run's scheme is {scheme}; use "
                f"--model.scheme.bits {own.bits} --model.scheme.group_size {own.group_size}, or leave it out with "
                "--model.exclude"
            )
        return stored_names, BY_NUMBER[number]
