"""A linear layer that keeps its weight in one of SAGE-PTQ's layouts: what such a model runs on.

*Structured*: two products over packed codes, one with the salient inputs and one with the others, each an ordinary
quantized matrix; a table of scales is looked up once for each group. *Element*: signs and group numbers index a table
of signed scales per matrix, the look-up of the paper (arXiv 2606.05429); the salient weights replace their entries.

The buffers are called like the tensors of a block file, so that ``load_state_dict`` with a file's part of one weight is
all that loading takes.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from lightning_gsq.ops.packed_linear import packed_linear
from lightning_gsq.packing import unpack
from lightning_gsq.qtensor import QuantizedWeight
from lightning_gsq.sage.tensors import index_bits, other_columns, unpack_flat, unpack_weight
from lightning_gsq.scheme import QuantScheme


def sage_linear_reference(
    x: Tensor, parts: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int], bias_O: Tensor | None = None
) -> Tensor:
    """``x w^T + bias`` in fp32, rounded once to x's dtype: the specification.

    Args:
        x: ``... I``.
        parts: The packed tensors of the weight.
        scheme: Settled.
        shape: ``(O, I)``.
        bias_O: Or None.
    """
    w_OI = unpack_weight({name: part.cpu() for name, part in parts.items()}, scheme, shape).dequantize().to(x.device)
    return nn.functional.linear(x.float(), w_OI, None if bias_O is None else bias_O.float()).to(x.dtype)


class SageLinear(nn.Module):
    """Takes the place of ``nn.Linear`` for a weight of either layout.

    Casting the module leaves the scales in their stored dtype: they are data, and rounding them changes the weight.

    Args:
        tensor: The quantized weight.
        bias: Of the layer, or None.
    """

    columns_K: Tensor
    others_R: Tensor
    members_OG: Tensor

    def __init__(self, tensor: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.scheme, self.shape = tensor.scheme, tensor.shape
        packed = tensor.pack()
        self.names = list(packed)
        for name, part in packed.items():
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._look_up()
        self.register_load_state_dict_post_hook(lambda *_: self._look_up())

    @property
    def parts(self) -> dict[str, Tensor]:
        """The packed tensors."""
        return {name: self.get_buffer(name) for name in self.names}

    def forward(self, x: Tensor) -> Tensor:
        """``... I`` to ``... O`` in x's dtype."""
        if not hasattr(self, "columns_K"):
            return sage_linear_reference(x, self.parts, self.scheme, self.shape, self.bias)
        parts, plain = self.parts, self.scheme.plain
        scales_OG = parts["table"][self.members_OG.long()] if "table" in parts else parts["scales"]
        rest = x.index_select(-1, self.others_R) if len(self.columns_K) else x
        y = _product(rest, parts["codes"], scales_OG, self.bias, plain)
        if not len(self.columns_K):
            return y
        assert self.scheme.salient is not None
        salient = x.index_select(-1, self.columns_K)
        grid = self.scheme.salient.scheme
        return y + _product(salient, parts["salient_codes"], parts["salient_scales"], None, grid)

    def _look_up(self) -> None:
        """What is derived from the packed tensors: indices of columns, numbers of scales."""
        if "columns" not in self.names:
            return
        (rows, columns), device = self.shape, self.get_buffer("columns").device
        columns_K = unpack(self.get_buffer("columns"), 1, columns)[0].nonzero().flatten()
        self.register_buffer("columns_K", columns_K.to(device), persistent=False)
        self.register_buffer("others_R", other_columns(columns_K, columns).to(device), persistent=False)
        if "table" in self.names:
            groups = self.scheme.num_groups(columns - len(columns_K))
            bits = index_bits(len(self.get_buffer("table")))
            members = unpack_flat(self.get_buffer("members"), bits, rows * groups).view(rows, groups)
            self.register_buffer("members_OG", members.to(device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: part for name, part in self.parts.items() if part.is_floating_point()}
        super()._apply(fn, recurse)
        for name, part in kept.items():
            self.register_buffer(name, part.to(self.get_buffer(name).device))
        return self


def _product(x: Tensor, words_OW: Tensor, scales_OG: Tensor, bias_O: Tensor | None, scheme: QuantScheme) -> Tensor:
    in_features = x.shape[-1]
    length = scheme.group_length(in_features)
    return packed_linear(x, words_OW, scales_OG, bias_O, bits=scheme.bits, in_features=in_features, group_length=length)
