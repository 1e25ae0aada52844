"""A quantized weight: integer codes, one scale a group, and what both cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_gsq.weights.packing import pack, packed_words, unpack
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
        codes_OI: int8 levels (not offset): for 2 bits -2 ... 1.
        scales_OG: Floating point, one a group.
        scheme: The grid and the group size.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    scheme: QuantScheme

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.codes_OI.shape[0], self.codes_OI.shape[1]

    @property
    def scales(self) -> tuple[Tensor]:
        """The scales ``O G``."""
        return (self.scales_OG,)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Codes and fp32 scales."""
        return self.codes_OI, self.scales_OG.float()

    def cpu(self) -> QuantizedTensor:
        """The same on the CPU."""
        return QuantizedTensor(self.codes_OI.cpu(), self.scales_OG.cpu(), self.scheme)

    def ledger(self) -> BitsLedger:
        """What the packed tensors cost."""
        rows, columns = self.shape
        words = rows * packed_words(columns, self.scheme.storage_bits)
        return BitsLedger(rows * columns, 32 * words, 8 * self.scales_OG.element_size() * self.scales_OG.numel())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``O I``; computed in fp32, then rounded to ``dtype``."""
        in_features = self.shape[1]
        scales = expand_groups(self.scales_OG.float(), in_features, self.scheme.group_length(in_features))
        return (self.codes_OI * scales).to(dtype)

    def pack(self) -> dict[str, Tensor]:
        """``{"codes": int32 words, "scales": O G}``: what a block file holds."""
        return {
            "codes": pack(self.scheme.grid.store(self.codes_OI), self.scheme.storage_bits),
            "scales": self.scales_OG.cpu().contiguous(),
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedTensor:
        """Inverse of :meth:`pack`.

        Raises:
            ValueError: a shape, a dtype or a code does not fit the scheme.
        """
        rows, columns = shape
        scales, groups = tensors["scales"], scheme.num_groups(columns)
        if tuple(scales.shape) != (rows, groups) or not scales.dtype.is_floating_point:
            raise ValueError(
                f"expected floating-point scales of shape ({rows}, {groups}), got {scales.dtype} {tuple(scales.shape)}"
            )
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("the scales are not all finite")
        if tensors["codes"].ndim != 2 or tensors["codes"].shape[0] != rows:
            raise ValueError(f"expected codes with {rows} rows, got shape {tuple(tensors['codes'].shape)}")
        codes_OI = scheme.grid.restore(unpack(tensors["codes"], scheme.storage_bits, columns))
        return cls(codes_OI, scales, scheme)


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
