"""Weights of which a part is salient, beside :class:`lightning_gsq.weights.quantized.QuantizedTensor`: the two layouts.

*Structured*: the input columns fall into salient ones and the rest, each an ordinary quantized tensor with its own grid
and scales. A bitmap over the columns says which is which: ``1 / O`` bits a weight, never more than an index list of a
sixteenth of them. The rest may share a table of n scales, each group of weights then stores the number of its scale.

*Element*: the published layout. Every weight is salient or not, every other weight has a sign and the number of its
scale, so positions cost at least ``log2(n)`` bits a weight. A signed scale stands for group and sign in the look-up.

What a part of the file is for is told by its name; :meth:`ledger` counts exactly these tensors.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.weights.packing import pack, packed_words, unpack
from lightning_gsq.weights.positions import decode_positions, encode_positions
from lightning_gsq.weights.quantized import BitsLedger, QuantizedTensor, QuantizedWeight
from lightning_gsq.weights.scheme import QuantScheme


def unpack_weight(tensors: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedWeight:
    """Inverse of ``pack`` for any settled scheme.

    Raises:
        ValueError: the tensors do not fit the scheme.
    """
    if scheme.salient is None:
        _expect(tensors, {"codes", "scales"})
        return QuantizedTensor.unpack(tensors, scheme, shape)
    if scheme.salient.layout == "element":
        return ElementTensor.unpack(tensors, scheme, shape)
    return MixedTensor.unpack(tensors, scheme, shape)


def index_bits(count: int) -> int:
    """Bits of a number below ``count``."""
    return math.ceil(math.log2(count)) if count > 1 else 0


@dataclass(frozen=True)
class MixedTensor:
    """The structured layout.

    Args:
        columns_K: int64, the salient input columns, rising; may be empty.
        salient: Their weights ``O K``; None without salient columns.
        rest: The other columns' weights ``O (I - K)``; its scales are those of the table where there is one.
        scheme: Settled.
        table_n: The distinct scales of the rest, rising; None where every group has its own.
        members_OG: Number of each group's scale; None without a table.
    """

    columns_K: Tensor
    salient: QuantizedTensor | None
    rest: QuantizedTensor
    scheme: QuantScheme
    table_n: Tensor | None = None
    members_OG: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.rest.shape[0], self.rest.shape[1] + len(self.columns_K)

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """Scales of the rest and of the salient columns."""
        return self.rest.scales + (self.salient.scales if self.salient is not None else ())

    def parts(self) -> tuple[Tensor, ...]:
        """Columns, codes and fp32 scales."""
        salient = () if self.salient is None else self.salient.parts()
        return (self.columns_K, *self.rest.parts(), *salient)

    def cpu(self) -> MixedTensor:
        """The same on the CPU."""
        return dataclasses.replace(
            self,
            columns_K=self.columns_K.cpu(),
            salient=None if self.salient is None else self.salient.cpu(),
            rest=self.rest.cpu(),
            table_n=None if self.table_n is None else self.table_n.cpu(),
            members_OG=None if self.members_OG is None else self.members_OG.cpu(),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``O I``; computed in fp32, then rounded to ``dtype``."""
        rest_OR = self.rest.dequantize(dtype)
        salient_OK = rest_OR[:, :0] if self.salient is None else self.salient.dequantize(dtype)
        return merge_columns(rest_OR, salient_OK, self.columns_K)

    def pack(self) -> dict[str, Tensor]:
        """``columns``, ``codes``, ``scales`` (or ``table`` and ``members``), ``salient_codes``, ``salient_scales``."""
        mask_I = torch.zeros(1, self.shape[1], dtype=torch.uint8)
        mask_I[0, self.columns_K.cpu()] = 1
        packed = {"columns": pack(mask_I, 1), **self.rest.pack()}
        if self.salient is not None:
            packed |= {f"salient_{part}": value for part, value in self.salient.pack().items()}
        if self.table_n is not None and self.members_OG is not None:
            del packed["scales"]
            packed["table"] = self.table_n.cpu().contiguous()
            packed["members"] = _pack_flat(self.members_OG, index_bits(len(self.table_n)))
        return packed

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> MixedTensor:
        """Inverse of :meth:`pack`.

        Raises:
            ValueError: the tensors do not fit the scheme.
        """
        assert scheme.salient is not None and scheme.salient.ratio is not None
        (rows, columns), count = shape, scheme.salient.scale_groups
        wanted = {"columns", "codes", *(("scales",) if count is None else ("table", "members"))}
        _expect(tensors, wanted | ({"salient_codes", "salient_scales"} if scheme.salient.ratio > 0 else set()))
        mask_I = unpack(tensors["columns"], 1, columns)[0].bool()
        columns_K = mask_I.nonzero().flatten()
        if len(columns_K) != round(scheme.salient.ratio * columns) or len(columns_K) == columns:
            raise ValueError(f"{len(columns_K)} salient columns of {columns} do not fit {scheme.salient}")
        plain, others = scheme.plain, columns - len(columns_K)
        table_n, members_OG, scales_OG = None, None, tensors.get("scales")
        if isinstance(count, int):
            table_n = tensors["table"]
            if table_n.shape != (count,):
                raise ValueError(f"expected a table of {count} scales, got shape {tuple(table_n.shape)}")
            groups = plain.num_groups(others)
            members_OG = unpack_flat(tensors["members"], index_bits(count), rows * groups).view(rows, groups)
            if members_OG.numel() and int(members_OG.max()) >= count:
                raise ValueError(f"a group names a scale beyond the {count} of the table")
            scales_OG = table_n[members_OG.long()]
        assert scales_OG is not None
        rest = QuantizedTensor.unpack({"codes": tensors["codes"], "scales": scales_OG}, plain, (rows, others))
        salient = None
        if len(columns_K):
            parts = {part: tensors[f"salient_{part}"] for part in ("codes", "scales")}
            salient = QuantizedTensor.unpack(parts, scheme.salient.scheme, (rows, len(columns_K)))
        return cls(columns_K, salient, rest, scheme, table_n, members_OG)

    def ledger(self) -> BitsLedger:
        """What the packed tensors cost."""
        rest = self.rest.ledger()
        total = rest if self.salient is None else rest + self.salient.ledger()
        positions, scale_bits = 32 * packed_words(self.shape[1], 1), total.scale_bits
        if self.table_n is not None and self.members_OG is not None:
            scale_bits += 8 * self.table_n.nbytes - rest.scale_bits
            positions += 32 * packed_words(self.members_OG.numel(), index_bits(len(self.table_n)))
        return BitsLedger(total.weights, total.code_bits, scale_bits, positions)


@dataclass(frozen=True)
class ElementTensor:
    """The element layout; flat tensors follow the weights row by row.

    Args:
        mask_OI: bool, the salient weights.
        salient_codes: int8 levels, one a salient weight.
        salient_scales_O: One scale an output channel.
        positive: bool, one an unsalient weight: its sign.
        members: uint8, one an unsalient weight: the number of its scale.
        table_n: The distinct scales of the unsalient weights.
        scheme: Settled.
    """

    mask_OI: Tensor
    salient_codes: Tensor
    salient_scales_O: Tensor
    positive: Tensor
    members: Tensor
    table_n: Tensor
    scheme: QuantScheme

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.mask_OI.shape[0], self.mask_OI.shape[1]

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """The table and the salient weights' scales."""
        return self.table_n, self.salient_scales_O

    def parts(self) -> tuple[Tensor, ...]:
        """Everything that is packed."""
        return tuple(self.pack().values())

    def cpu(self) -> ElementTensor:
        """The same on the CPU."""
        return ElementTensor(
            self.mask_OI.cpu(),
            self.salient_codes.cpu(),
            self.salient_scales_O.cpu(),
            self.positive.cpu(),
            self.members.cpu(),
            self.table_n.cpu(),
            self.scheme,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``O I``; computed in fp32, then rounded to ``dtype``."""
        dense_OI = self.salient_scales_O.float()[:, None].repeat(1, self.shape[1])
        dense_OI[self.mask_OI] *= self.salient_codes.float()
        # The look-up table of signs and groups: entry g is -a[g], entry n + g is +a[g].
        signed = torch.cat([-self.table_n, self.table_n]).float()
        dense_OI[~self.mask_OI] = signed[self.members.long() + len(self.table_n) * self.positive.long()]
        return dense_OI.to(dtype)

    def pack(self) -> dict[str, Tensor]:
        """``salient_codes``, ``salient_scales``, ``signs``, ``members``, ``table``, and the positions.

        The positions are called ``bitmap`` or ``gaps<width>``.
        """
        assert self.scheme.salient is not None
        bits = self.scheme.salient.bits
        width, words = encode_positions(self.mask_OI)
        return {
            f"gaps{width}" if width else "bitmap": words,
            "salient_codes": _pack_flat(self.salient_codes.short() + 2 ** (bits - 1), bits),
            "salient_scales": self.salient_scales_O.cpu().contiguous(),
            "signs": _pack_flat(self.positive.to(torch.uint8), 1),
            "members": _pack_flat(self.members, index_bits(len(self.table_n))),
            "table": self.table_n.cpu().contiguous(),
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> ElementTensor:
        """Inverse of :meth:`pack`.

        Raises:
            ValueError: the tensors do not fit the scheme.
        """
        salient = scheme.salient
        assert salient is not None and salient.ratio is not None and isinstance(salient.scale_groups, int)
        wanted = {"salient_codes", "salient_scales", "signs", "members", "table"}
        where = {name for name in tensors if name == "bitmap" or name.startswith("gaps")}
        _expect(tensors, wanted | where)
        if len(where) != 1:
            raise ValueError(f"expected one tensor of positions, got {sorted(where)}")
        name, size = where.pop(), shape[0] * shape[1]
        width = 0 if name == "bitmap" else int(name.removeprefix("gaps"))
        count = round(salient.ratio * size)
        if tensors["table"].shape != (salient.scale_groups,) or tensors["salient_scales"].shape != (shape[0],):
            raise ValueError(f"the scales do not fit {salient.scale_groups} groups and {shape[0]} channels")
        members = unpack_flat(tensors["members"], index_bits(salient.scale_groups), size - count)
        if members.numel() and int(members.max()) >= salient.scale_groups:
            raise ValueError(f"a weight names a scale beyond the {salient.scale_groups} of the table")
        return cls(
            decode_positions(width, tensors[name], shape, count),
            (unpack_flat(tensors["salient_codes"], salient.bits, count).short() - 2 ** (salient.bits - 1)).to(
                torch.int8
            ),
            tensors["salient_scales"],
            unpack_flat(tensors["signs"], 1, size - count).bool(),
            members,
            tensors["table"],
            scheme,
        )

    def ledger(self) -> BitsLedger:
        """What the packed tensors cost."""
        bits = {name: 8 * value.nbytes for name, value in self.pack().items()}
        codes = bits.pop("salient_codes") + bits.pop("signs")
        scales = bits.pop("salient_scales") + bits.pop("table")
        return BitsLedger(self.mask_OI.numel(), codes, scales, sum(bits.values()))

    def nominal_bits(self) -> float:
        """Bits a weight as the papers of this field count them: signs and salient codes, no positions, no scales."""
        assert self.scheme.salient is not None
        return 1 + (self.scheme.salient.bits - 1) * len(self.salient_codes) / self.mask_OI.numel()


def merge_columns(rest_OR: Tensor, salient_OK: Tensor, columns_K: Tensor) -> Tensor:
    """Puts both parts' columns back into their places; differentiable."""
    return torch.cat([rest_OR, salient_OK], dim=1).index_select(1, merge_order(columns_K, rest_OR.shape[1]))


def merge_order(columns_K: Tensor, others: int) -> Tensor:
    """For each input column its place in ``[rest, salient]``, int64 ``I``."""
    total = others + len(columns_K)
    rest_R = other_columns(columns_K, total)
    order_I = torch.empty(total, dtype=torch.int64, device=columns_K.device)
    order_I[torch.cat([rest_R, columns_K])] = torch.arange(total, device=columns_K.device)
    return order_I


def other_columns(columns_K: Tensor, in_features: int) -> Tensor:
    """The columns that are not salient, rising."""
    mask_I = torch.ones(in_features, dtype=torch.bool, device=columns_K.device)
    mask_I[columns_K] = False
    return mask_I.nonzero().flatten()


def _pack_flat(values: Tensor, bits: int) -> Tensor:
    """One stream for all values: no row ends in padding."""
    return pack(values.reshape(1, -1), bits) if bits else torch.zeros(1, 0, dtype=torch.int32)


def unpack_flat(words: Tensor, bits: int, count: int) -> Tensor:
    """``count`` values of one stream, uint8; zeros where a value takes no bits."""
    return unpack(words, bits, count)[0] if bits else torch.zeros(count, dtype=torch.uint8)


def _expect(tensors: dict[str, Tensor], names: set[str]) -> None:
    if set(tensors) != names:
        raise ValueError(f"it is stored as {sorted(tensors)}, expected {sorted(names)}")
