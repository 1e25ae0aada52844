"""A quantized weight: codes, scales in their stored form, and what both cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lightning_gsq.weights.layout import FLOATS, SCALES
from lightning_gsq.weights.packing import WORD_BITS, pack, packed_words, unpack
from lightning_gsq.weights.scheme import QuantScheme


def expand_groups(s_OG: Tensor, in_features: int, group_length: int) -> Tensor:
    """Repeats each group's value over its weights: ``O G`` to ``O I``; the last group may be ragged."""
    return s_OG.repeat_interleave(group_length, dim=1)[:, :in_features]


def reduce_groups(x_OI: Tensor, group_length: int) -> Tensor:
    """Sums over each group: ``O I`` to ``O G``; the last group may be ragged."""
    rows, columns = x_OI.shape
    full = columns // group_length
    sums = x_OI[:, : full * group_length].reshape(rows, full, group_length).sum(-1)
    if full * group_length == columns:
        return sums
    return torch.cat([sums, x_OI[:, full * group_length :].sum(-1, keepdim=True)], dim=1)


class QuantizedWeight(Protocol):
    """A finished weight matrix, however it is stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""

    @property
    def scheme(self) -> QuantScheme:
        """How it is quantized; nothing left open."""

    @property
    def scales(self) -> Iterable[Tensor]:
        """Every tensor of scales."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``O I``."""

    def pack(self) -> dict[str, Tensor]:
        """The tensors that a block file holds."""

    def ledger(self) -> BitsLedger:
        """What the packed tensors cost."""

    def cpu(self) -> QuantizedWeight:
        """The same on the CPU."""

    def parts(self) -> Iterable[Tensor]:
        """Every tensor that the weight depends on, scales in fp32: what a fingerprint is made of."""


@dataclass(frozen=True)
class QuantizedTensor:
    """The codes and scales of one weight matrix.

    Args:
        codes_OI: Codes of the scheme's grid (not offset): for 2 bits -2 ... 1. int8, int16 where these are too narrow.
        scales_OG: Floating point, one a group; one a block under a two-level layout.
        scheme: The grid, the group size and the layout of scales.
        others: What the layout stores beside ``scales_OG``, by name (:mod:`lightning_gsq.weights.layout`).
    """

    codes_OI: Tensor
    scales_OG: Tensor
    scheme: QuantScheme
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.codes_OI.shape[0], self.codes_OI.shape[1]

    @property
    def scale_parts(self) -> dict[str, Tensor]:
        """Everything that is stored for the scales, by name."""
        return {SCALES: self.scales_OG, **self.others}

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """Scales and offsets as far as they are floats."""
        return tuple(value for name, value in self.scale_parts.items() if name in FLOATS)

    @property
    def group_length(self) -> int:
        """Weights in a full group."""
        return self.scheme.group_length(self.shape[1])

    def parts(self) -> tuple[Tensor, ...]:
        """Codes and fp32 scales."""
        return self.codes_OI, *(value.float() for value in self.scale_parts.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The same with every tensor changed, such as moved or with its rows in another order."""
        others = {name: change(value) for name, value in self.others.items()}
        return QuantizedTensor(change(self.codes_OI), change(self.scales_OG), self.scheme, others)

    def cpu(self) -> QuantizedTensor:
        """The same on the CPU."""
        return self.map(Tensor.cpu)

    def ledger(self) -> BitsLedger:
        """What the packed tensors cost."""
        rows, columns = self.shape
        words = rows * sum(self.scheme.grid.words(columns).values())
        scale_bits = stored_scale_bits(self.scheme, rows, columns, 8 * self.scales_OG.element_size())
        return BitsLedger(rows * columns, WORD_BITS * words, scale_bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``O I``; computed in fp32, then rounded to ``dtype``."""
        values_OI = self.scheme.grid.value_of(self.codes_OI)
        layout, parts = self.scheme.layout, self.scale_parts
        return scale_values(values_OI, layout.scales(parts), layout.offsets(parts), self.group_length).to(dtype)

    def pack(self) -> dict[str, Tensor]:
        """``codes`` (int32 words; of code vectors more), ``scales`` and the layout's other parts: a block file's."""
        integers = {name: part.integers for name, part in self.scheme.parts(self.shape[1]).items()}
        packed = self.scheme.grid.pack(self.codes_OI)
        for name, value in self.scale_parts.items():
            kind = integers[name]
            packed[name] = value.cpu().contiguous() if kind is None else pack(value - kind.low, kind.bits)
        return packed

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedTensor:
        """Inverse of :meth:`pack`.

        Raises:
            ValueError: a shape, a dtype or a code does not fit the scheme.
        """
        rows, columns = shape
        parts = {}
        for name, part in scheme.parts(columns).items():
            value = tensors[name]
            if part.integers is not None:
                parts[name] = unpack(value, part.integers.bits, part.columns).to(torch.int16) + part.integers.low
                value = parts[name]
            elif not value.dtype.is_floating_point or (scheme.layout.dtype or value.dtype) != value.dtype:
                raise ValueError(f"expected {scheme.layout.dtype or 'floating-point'} {name}, got {value.dtype}")
            elif not bool(torch.isfinite(value).all()):
                raise ValueError(f"the {name} are not all finite")
            if tuple(value.shape) != (rows, part.columns):
                raise ValueError(f"expected {name} of shape ({rows}, {part.columns}), got {tuple(value.shape)}")
            parts[name] = value
        for name in scheme.grid.fields(columns):
            if tensors[name].ndim != 2 or tensors[name].shape[0] != rows:
                raise ValueError(f"expected {name} with {rows} rows, got shape {tuple(tensors[name].shape)}")
        codes_OI = scheme.grid.verified(scheme.grid.unpack(tensors, columns))
        return cls(codes_OI, parts.pop(SCALES), scheme, parts)


def scale_values(values_OI: Tensor, s_OG: Tensor, o_OG: Tensor | None, group_length: int) -> Tensor:
    """``s * value + o`` in fp32, ``O I``: what every layout amounts to."""
    columns = values_OI.shape[1]
    w_OI = values_OI * expand_groups(s_OG, columns, group_length)
    return w_OI if o_OG is None else w_OI + expand_groups(o_OG, columns, group_length)


def stored_scale_bits(scheme: QuantScheme, rows: int, columns: int, float_bits: int) -> int:
    """Bits of the packed tensors of a matrix's scales, what fills words up included.

    Args:
        scheme: Its scheme.
        rows: ``O``.
        columns: ``I``.
        float_bits: Bits of one float, unless the layout fixes its dtype.
    """
    if scheme.layout.dtype is not None:
        float_bits = 8 * scheme.layout.dtype.itemsize
    sizes = (
        part.columns * float_bits
        if part.integers is None
        else WORD_BITS * packed_words(part.columns, part.integers.bits)
        for part in scheme.parts(columns).values()
    )
    return rows * sum(sizes)


def packed_like(scheme: QuantScheme, rows: int, columns: int, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """What :meth:`QuantizedTensor.pack` gives for such a matrix, on the meta device: shapes and dtypes alone."""
    codes = torch.empty(rows, packed_words(columns, scheme.storage_bits), dtype=torch.int32, device="meta")
    tensors = {"codes": codes}
    for name, part in scheme.parts(columns).items():
        dtype = scheme.layout.dtype or scale_dtype
        width = part.columns
        if part.integers is not None:
            dtype, width = torch.int32, packed_words(part.columns, part.integers.bits)
        tensors[name] = torch.empty(rows, width, dtype=dtype, device="meta")
    return tensors


@dataclass(frozen=True)
class BitsLedger:
    """What quantized weights cost, in bits; sums with ``+``.

    ``code_bits`` counts the packed words as stored, padding at the end of rows included; ``position_bits`` what says
    which weights are salient and which scale each group has.
    """

    weights: int = 0
    code_bits: int = 0
    scale_bits: int = 0
    position_bits: int = 0

    @classmethod
    def of(cls, tensor: QuantizedWeight) -> BitsLedger:
        """The ledger of one weight matrix."""
        return tensor.ledger()

    def __add__(self, other: BitsLedger) -> BitsLedger:
        return BitsLedger(
            self.weights + other.weights,
            self.code_bits + other.code_bits,
            self.scale_bits + other.scale_bits,
            self.position_bits + other.position_bits,
        )

    @property
    def total_bits(self) -> int:
        """All bits."""
        return self.code_bits + self.scale_bits + self.position_bits

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and positions."""
        return self.total_bits // 8

    def per_weight(self) -> dict[str, float]:
        """Bits per quantized weight: ``codes``, ``scales``, ``positions`` and ``total``."""
        count = max(self.weights, 1)
        return {
            "codes": self.code_bits / count,
            "scales": self.scale_bits / count,
            "positions": self.position_bits / count,
            "total": self.total_bits / count,
        }
