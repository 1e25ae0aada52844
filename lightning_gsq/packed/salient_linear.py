"""A linear layer that keeps its weight in one of SAGE-PTQ's layouts: what such a model runs on.

*Structured*: two products over packed codes, one with the salient inputs and one with the others, each an ordinary
quantized matrix; a table of scales is looked up once for each group. *Element*: signs and group numbers index a table
of signed scales per matrix, the look-up of the paper (arXiv 2606.05429); the salient weights replace their entries.

The buffers are called like the tensors of a block file, so that ``load_state_dict`` with a file's part of one weight is
all that loading takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.ops.packed_linear import packed_linear
from lightning_gsq.packed.layers import made_on_demand, new_bias
from lightning_gsq.weights.mixed import other_columns
from lightning_gsq.weights.packing import index_bits, unpack, unpack_flat
from lightning_gsq.weights.quantized import QuantizedWeight
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.stored import unpack_weight

PARTS = {"columns", "codes", "scales", "table", "members", "salient_codes", "salient_scales", "signs", "bitmap"}
SCALES = {"scales", "table", "salient_scales"}
"""Names of the packed tensors, and of those that hold scales; ``gaps8`` and its like are names too."""


def is_part(name: str) -> bool:
    """Whether a tensor of that name belongs to a weight of either layout."""
    return name in PARTS or (name.startswith("gaps") and name[4:].isdigit())


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
        scheme: Settled.
        site: Shape and orientation.
        parts: The packed tensors by name; on the meta device where values are still to be loaded.
        bias: Whether the layer has one.
        dtype: Dtype of the bias and of ``weight``; casting the module changes it.
    """

    columns_K: Tensor
    others_R: Tensor
    members_OG: Tensor
    cast: Tensor

    def __init__(
        self,
        scheme: QuantScheme,
        site: LinearSite,
        parts: Mapping[str, Tensor],
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.site = scheme, site
        self.names = list(parts)
        for name, part in parts.items():
            self.register_buffer(name, part)
        device = next(iter(parts.values())).device
        # Holds no number: it is there to be cast together with the model's parameters.
        self.register_buffer("cast", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.in_features, self.out_features = site.in_features, site.out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", new_bias(site, bias, dtype, device))
        if device.type != "meta":
            self.look_up()
        self.register_load_state_dict_post_hook(lambda *_: self.look_up())

    @classmethod
    def of(cls, tensor: QuantizedWeight, bias: Tensor | None = None) -> SageLinear:
        """The layer of a finished weight."""
        rows, columns = tensor.shape
        site = LinearSite("weight", 0, rows, columns, transposed=False)
        layer = cls(tensor.scheme, site, tensor.pack(), bias is not None, None if bias is None else bias.dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.out_features, self.in_features

    @property
    def parts(self) -> dict[str, Tensor]:
        """The packed tensors."""
        return {name: self.get_buffer(name) for name in self.names}

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew each time: for code that looks at a layer's weight, its dtype or device."""
        return made_on_demand(self.dequantize(self.cast.dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight in the shape of the parameter that it stands for."""
        device = self.cast.device
        if device.type == "meta":
            return self.site.from_matrix(torch.empty(self.shape, dtype=dtype, device=device))
        parts = {name: part.cpu() for name, part in self.parts.items()}
        return self.site.from_matrix(unpack_weight(parts, self.scheme, self.shape).dequantize(dtype).to(device))

    def check_values(self) -> None:
        """Checks what came from a file.

        Raises:
            ValueError: a scale is not finite, or the parts do not fit each other.
        """
        parts = {name: part.cpu() for name, part in self.parts.items()}
        if not all(bool(torch.isfinite(part).all()) for name, part in parts.items() if name in SCALES):
            raise ValueError("the scales are not all finite")
        try:
            unpack_weight(parts, self.scheme, self.shape)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"its parts do not fit each other: {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        """``... I`` to ``... O`` in x's dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
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
        grid = self.scheme.salient_scheme
        return y + _product(salient, parts["salient_codes"], parts["salient_scales"], None, grid)

    def look_up(self) -> None:
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

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        floats = {name: part for name, part in self.parts.items() if part.is_floating_point()}
        super()._apply(fn, recurse)
        for name, part in floats.items():
            self.register_buffer(name, part.to(self.get_buffer(name).device))
        return self


def _product(x: Tensor, words_OW: Tensor, scales_OG: Tensor, bias_O: Tensor | None, scheme: QuantScheme) -> Tensor:
    columns = x.shape[-1]
    bits, length = scheme.storage_bits, scheme.group_length(columns)
    return packed_linear(x, words_OW, scales_OG, bias_O, bits=bits, in_features=columns, group_length=length)
