"""The element layout of salient weights, as SAGE-PTQ (arXiv 2606.05429) published it.

Every weight is salient or not, every other weight has a sign and the number of its scale, so positions cost at least
``log2(n)`` bits a weight. A signed scale stands for group and sign in the look-up. What a part of the file is for is
told by its name; :meth:`ElementTensor.ledger` counts exactly these tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.weights.packing import expect_parts, index_bits, pack_flat, unpack_flat
from lightning_gsq.weights.positions import decode_positions, encode_positions
from lightning_gsq.weights.quantized import BitsLedger
from lightning_gsq.weights.scheme import QuantScheme


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
        grid = self.scheme.salient_scheme.grid
        width, words = encode_positions(self.mask_OI)
        return {
            f"gaps{width}" if width else "bitmap": words,
            "salient_codes": pack_flat(grid.store(self.salient_codes), grid.storage_bits),
            "salient_scales": self.salient_scales_O.cpu().contiguous(),
            "signs": pack_flat(self.positive.to(torch.uint8), 1),
            "members": pack_flat(self.members, index_bits(len(self.table_n))),
            "table": self.table_n.cpu().contiguous(),
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> ElementTensor:
        """Inverse of :meth:`pack`.

        Raises:
            ValueError: the tensors do not fit the scheme.
        """
        salient, grid = scheme.salient, scheme.salient_scheme.grid
        assert salient is not None and salient.ratio is not None and isinstance(salient.scale_groups, int)
        wanted = {"salient_codes", "salient_scales", "signs", "members", "table"}
        where = {name for name in tensors if name == "bitmap" or name.startswith("gaps")}
        expect_parts(tensors, wanted | where)
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
            grid.restore(unpack_flat(tensors["salient_codes"], grid.storage_bits, count)),
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
