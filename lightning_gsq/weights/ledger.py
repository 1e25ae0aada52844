"""What a model costs on disk, to the bit.

A quantized model is sold by its bits a weight, and that number is easily made too small: scales left out, padding left
out, the embedding left out. Here every bit of every weight file belongs to exactly one entry or to a file's header, so
that the sum is the size of the files, and anyone can add it up again:

    size = sum over parameters (codes + scales + positions + padding + redundant + unquantized) / 8 + headers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gsq.weights.packing import WORD_BITS
from lightning_gsq.weights.quantized import QuantizedTensor, QuantizedWeight, stored_scale_bits
from lightning_gsq.weights.scheme import QuantScheme

PARTS = ("codes", "scales", "positions", "padding", "redundant", "unquantized")


@dataclass(frozen=True)
class LedgerEntry:
    """The bits of one parameter.

    Args:
        name: Parameter name in the model.
        weights: How many weights it stands for.
        codes: Bits of level codes; a ternary code takes the two bits that it is stored in.
        scales: Bits of scales.
        positions: Bits that say where single weights lie; zero for grids that treat all weights of a group alike.
        padding: Bits that fill a row or a block up and mean nothing.
        redundant: Bits that a format stores although they follow from the rest: shapes, zero points, group numbers.
        unquantized: Bits of weights stored as plain numbers.
    """

    name: str
    weights: int
    codes: int = 0
    scales: int = 0
    positions: int = 0
    padding: int = 0
    redundant: int = 0
    unquantized: int = 0

    @classmethod
    def packed(cls, name: str, shape: tuple[int, int], scheme: QuantScheme, scale_bits: int) -> LedgerEntry:
        """A matrix ``(O, I)`` in the canonical packing.

        Args:
            name: Parameter name.
            shape: ``(O, I)``.
            scheme: Its grid and group size.
            scale_bits: Bits of one float of the scales, unless the layout fixes them.
        """
        rows, columns = shape
        codes = rows * scheme.grid.row_bits(columns)
        stored = rows * sum(scheme.grid.words(columns).values()) * WORD_BITS
        return cls(
            name,
            rows * columns,
            codes=codes,
            scales=stored_scale_bits(scheme, rows, columns, scale_bits),
            padding=stored - codes,
        )

    @classmethod
    def of(cls, name: str, tensor: QuantizedWeight) -> LedgerEntry:
        """A finished weight as a block file holds it; where its parts have rows of their own, codes count padding."""
        if isinstance(tensor, QuantizedTensor):
            return cls.packed(name, tensor.shape, tensor.scheme, 8 * tensor.scales_OG.element_size())
        bits = tensor.ledger()
        return cls(name, bits.weights, bits.code_bits, bits.scale_bits, bits.position_bits)

    @property
    def quantized(self) -> bool:
        """Whether it is stored as codes."""
        return self.codes > 0

    @property
    def bits(self) -> int:
        """All of its bits."""
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True)
class Ledger:
    """The bits of a model's weight files.

    Args:
        entries: One for each parameter that is stored.
        headers: Bytes of each file that belong to no parameter: header, metadata, alignment.
    """

    entries: tuple[LedgerEntry, ...] = ()
    headers: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        bits = sum(entry.bits for entry in self.entries)
        return -(-bits // 8) + sum(self.headers.values())

    def total(self, part: str, quantized_only: bool = False) -> int:
        """Bits of one part, a name of :data:`PARTS`, over all parameters."""
        return sum(getattr(entry, part) for entry in self.entries if entry.quantized or not quantized_only)

    def summary(self) -> dict[str, Any]:
        """The sums, as plain data: weights, bytes of each part, bits per quantized weight and per parameter."""
        quantized = [entry for entry in self.entries if entry.quantized]
        weights = sum(entry.weights for entry in quantized)
        parameters = sum(entry.weights for entry in self.entries)
        return {
            "quantized_weights": weights,
            "parameters": parameters,
            "bytes": {
                **{part: self.total(part) / 8 for part in PARTS},
                "headers": sum(self.headers.values()),
                "total": self.num_bytes,
            },
            "bits_per_quantized_weight": sum(entry.bits for entry in quantized) / max(weights, 1),
            "bits_per_parameter": 8 * self.num_bytes / max(parameters, 1),
            "headers": dict(self.headers),
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data: the sums, and every parameter's bits."""
        return {
            **self.summary(),
            "entries": {
                entry.name: {key: value for key, value in dataclasses.asdict(entry).items() if key != "name" and value}
                for entry in self.entries
            },
        }

    def verify(self, files: Iterable[Path]) -> None:
        """Checks that the sum is the size of the files, file by file for the headers' names.

        Raises:
            RuntimeError: it is not: the writer and its ledger disagree.
        """
        files = list(files)
        sizes = sum(file.stat().st_size for file in files)
        if {file.name for file in files} != set(self.headers) or sizes != self.num_bytes:
            raise RuntimeError(
                f"the ledger counts {self.num_bytes} bytes in {sorted(self.headers)}, the files "
                f"{sorted(file.name for file in files)} have {sizes}"
            )
