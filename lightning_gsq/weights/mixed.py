"""The structured layout of salient weights: whole input columns have more bits than the others.

The columns fall into salient ones and the rest, each an ordinary quantized tensor with its own grid and scales. A
bitmap over the columns says which is which: ``1 / O`` bits a weight, never more than an index list of a sixteenth of
them. The rest may share a table of n scales, each group of weights then stores the number of its scale.

What a part of the file is for is told by its name; :meth:`MixedTensor.ledger` counts exactly these tensors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.weights.packing import expect_parts, index_bits, pack, pack_flat, packed_words, unpack, unpack_flat
from lightning_gsq.weights.quantized import BitsLedger, QuantizedTensor, packed_like
from lightning_gsq.weights.salient_part import column_count
from lightning_gsq.weights.scheme import QuantScheme


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
            packed["members"] = pack_flat(self.members_OG, index_bits(len(self.table_n)))
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
        expect_parts(tensors, wanted | ({"salient_codes", "salient_scales"} if scheme.salient.ratio > 0 else set()))
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
            salient = QuantizedTensor.unpack(parts, scheme.salient_scheme, (rows, len(columns_K)))
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


def mixed_like(scheme: QuantScheme, rows: int, columns: int, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """What :meth:`MixedTensor.pack` gives for such a matrix, on the meta device: shapes and dtypes alone.

    Args:
        scheme: Structured, its ratio and its distinct scales known.
        rows: ``O``.
        columns: ``I``.
        scale_dtype: Stored dtype of the scales.
    """
    assert scheme.salient is not None and scheme.salient.ratio is not None
    count, table = column_count(scheme.salient.ratio, columns), scheme.salient.scale_groups

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    parts = {"columns": empty(1, packed_words(columns, 1))}
    parts |= packed_like(scheme.plain, rows, columns - count, scale_dtype)
    if count:
        salient = packed_like(scheme.salient_scheme, rows, count, scale_dtype)
        parts |= {f"salient_{name}": value for name, value in salient.items()}
    if isinstance(table, int):
        members = rows * parts.pop("scales").shape[1]
        parts |= {
            "table": empty(table, dtype=scale_dtype),
            "members": empty(1, packed_words(members, index_bits(table))),
        }
    return parts
