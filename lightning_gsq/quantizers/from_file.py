"""The start from a GGUF file: its own codes and scales, to be refined and written back as the same type.

A file that people deploy already has a grid: Q4_0 is -8 ... 7 in groups of 32, Q8_0 -128 ... 127 in groups of 32, and
so on. With this start, the block phase moves codes to neighbouring levels and trains the scales against the
full-precision model that ``--model.pretrained`` names; the export then writes the same types, with everything else
copied from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.blocks import BLOCK_TYPES, Q1_0, Q2_0, Q4_0, Q5_0, Q8_0, decode
from lightning_gsq.gguf.file import GGUFFile, StoredTensor
from lightning_gsq.gguf.names import ARCHITECTURES, Layout
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
        kind = next(kind for kind in BLOCK_TYPES.values() if kind.number == stored.number)
        codes_OI, scales_OG = decode(self.file.raw(stored_name), kind)
        if kind is Q2_0:
            codes_OI, scales_OG = -codes_OI, -scales_OG
        rows = self.layout.rows_of(stored_name, len(codes_OI))
        if rows is not None:
            order = rows.argsort()
            codes_OI, scales_OG = codes_OI[order], scales_OG[order]
        scales_OG = scales_OG.float().to(w_OI.device)
        codes_OI = codes_OI.to(torch.int8).to(w_OI.device)
        spread_OI = scales_OG.repeat_interleave(kind.length, dim=1)
        # A block of zeros has a scale of zero: its weights lie on any of its levels.
        position_OI = torch.where(spread_OI == 0, codes_OI.float(), w_OI / spread_OI)
        return Start(codes_OI, scales_OG, position_OI)

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
        own = SCHEMES.get(stored.number)
        if own is None:
            raise ConfigurationError(
                f"model.warm_start.file: {stored_name} is stored in ggml's type {stored.number}, whose grid is not one "
                f"of this project's; those are {', '.join(BLOCK_TYPES)}. Leave it out with --model.exclude"
            )
        if own != scheme:
            raise ConfigurationError(
                f"model.warm_start.file: {stored_name} is stored as {own}, the run's scheme is {scheme}; use "
                f"--model.scheme.bits {own.bits} --model.scheme.group_size {own.group_size}, or leave it out with "
                "--model.exclude"
            )
        return stored_name, stored
