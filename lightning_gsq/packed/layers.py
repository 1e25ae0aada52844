"""Modules whose weight stays packed in memory: the runtime of a quantized model.

:class:`QuantLinear` takes the place of ``nn.Linear`` and of GPT-2's ``Conv1D``. :class:`PackedExperts` takes the place
of a fused expert parameter ``E O I``: the model's own code picks ``parameter[e]``, and gets that expert's dense matrix,
made when it is asked for; the others stay packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.ops.packed_linear import dequantize_packed, grouped_packed_linear, packed_linear, unpack_values
from lightning_gsq.weights.packing import pack, packed_words
from lightning_gsq.weights.quantized import QuantizedTensor, scale_values
from lightning_gsq.weights.scheme import QuantScheme


class PackedWeight(nn.Module):
    """A quantized weight: ``codes`` (int32 words ``O W``), ``scales`` and what else is stored of it, all buffers.

    Casting the module (``.to(torch.bfloat16)``, ``.half()``) leaves the scales in their stored dtype: they are data,
    and another dtype would change the weights.

    Args:
        scheme: Grid and group size.
        site: Shape and orientation.
        scale_dtype: Dtype of the scales, unless the scheme's layout fixes it.
        dtype: Dtype of dense matrices that are made of it; casting the module changes it.
        device: Where to make the buffers.
    """

    codes: Tensor
    scales: Tensor
    cast: Tensor

    def __init__(
        self,
        scheme: QuantScheme,
        site: LinearSite,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.site = scheme, site
        self.code_words = scheme.grid.words(site.in_features)
        for name, words in self.code_words.items():
            self.register_buffer(name, torch.zeros(site.rows, words, dtype=torch.int32, device=device))
        self.scale_parts = scheme.parts(site.in_features)
        for name, part in self.scale_parts.items():
            width = part.columns if part.integers is None else packed_words(part.columns, part.integers.bits)
            stored = torch.int32 if part.integers is not None else scheme.layout.dtype or scale_dtype
            self.register_buffer(name, torch.zeros(site.rows, width, dtype=stored, device=device))
        # Holds no number: it is there to be cast together with the model's parameters.
        self.register_buffer("cast", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def fill(self, tensor: QuantizedTensor) -> Self:
        """Takes over codes and scales."""
        for name, value in tensor.pack().items():
            self.register_buffer(name, value.to(self.codes.device))
        return self

    @property
    def parts(self) -> dict[str, Tensor]:
        """What a file holds of it, by name."""
        return {name: self.get_buffer(name) for name in (*self.code_words, *self.scale_parts)}

    @property
    def layout(self) -> dict[str, Any]:
        """Keyword arguments of the packed ops, which know symmetric grids with a scale a group."""
        in_features = self.site.in_features
        return {
            "bits": self.scheme.storage_bits,
            "in_features": in_features,
            "group_length": self.scheme.group_length(in_features),
        }

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight in the shape of the parameter that it stands for."""
        return self.site.from_matrix(self.dense(self.parts, dtype))

    def dense(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The dense rows of packed ones, ``O I``, computed in fp32 and rounded once."""
        scheme, columns = self.scheme, self.site.in_features
        if scheme.plain_symmetric:
            return dequantize_packed(parts["codes"], parts["scales"], **self.layout, dtype=dtype)
        codes_OI = scheme.grid.unpack(parts, columns, unpack_values)
        stored = {}
        for name, part in self.scale_parts.items():
            value = parts[name]
            if part.integers is not None:
                value = unpack_values(value, part.integers.bits, part.columns) + part.integers.low
            stored[name] = value
        s_OG, o_OG = scheme.layout.scales(stored), scheme.layout.offsets(stored)
        return scale_values(scheme.grid.value_of(codes_OI), s_OG, o_OG, scheme.group_length(columns)).to(dtype)

    def product(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """``x w^T + bias``, from ``... I`` to ``... O``."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.scheme.plain_symmetric:
            return packed_linear(x, self.codes, self.scales, bias_O, **self.layout)
        return nn.functional.linear(x, self.dense(self.parts, x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    def check_values(self) -> None:
        """Checks what came from a file.

        Raises:
            ValueError: a scale is not finite, or a code is not a level of the scheme.
        """
        for name, part in self.scale_parts.items():
            if part.integers is None and not bool(torch.isfinite(self.get_buffer(name)).all()):
                raise ValueError(f"the {name} are not all finite")
        if self.scheme.grid.gaps:
            # Of the four codes of two bits, 0 is no level: every code has a bit set. Tested on whole words, where
            # the mask has the lower bit of each code that is not padding.
            mask_W = pack(torch.ones(1, self.site.in_features, dtype=torch.uint8), 2)[0].to(self.codes.device)
            if not bool(((self.codes | self.codes >> 1) & mask_W == mask_W).all()):
                raise ValueError(f"a code lies below the lowest level {self.scheme.grid.low} of a {self.scheme} weight")

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        experts = f"experts={self.site.experts}, " if self.site.experts else ""
        return (
            f"{experts}in_features={self.site.in_features}, out_features={self.site.out_features}, scheme={self.scheme}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = {name: self.get_buffer(name) for name, part in self.scale_parts.items() if part.integers is None}
        super()._apply(fn, recurse)
        for name, value in stored.items():
            if self.get_buffer(name).dtype != value.dtype:
                self.register_buffer(name, value.to(self.get_buffer(name).device))
        return self


def new_bias(
    site: LinearSite, wanted: bool, dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Parameter | None:
    """The bias of a layer with a packed weight, zero; None without one."""
    zeros = torch.zeros(site.out_features, dtype=dtype, device=device) if wanted else None
    return None if zeros is None else nn.Parameter(zeros, requires_grad=False)


def made_on_demand(weight: Tensor) -> Tensor:
    """A dense weight that code asked a packed layer for, to look at its dtype or device."""
    weight._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps transformers from filling it at random
    return weight


class QuantLinear(PackedWeight):
    """A linear layer with a packed weight: ``y = x w^T + bias``.

    Args:
        scheme: Grid and group size.
        site: Shape.
        bias: Whether there is one.
        scale_dtype: Dtype of the scales.
        dtype: Dtype of the bias and of ``weight``.
        device: Where to make the buffers.

    Example:
        >>> site = LinearSite("weight", 0, 256, 128, transposed=False)
        >>> layer = QuantLinear(QuantScheme(3, 64), site)
        >>> layer(torch.randn(4, 128)).shape
        torch.Size([4, 256])
    """

    def __init__(
        self,
        scheme: QuantScheme,
        site: LinearSite,
        bias: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(scheme, site, scale_dtype, dtype, device)
        self.in_features, self.out_features = site.in_features, site.out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", new_bias(site, bias, dtype, device))

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew each time: for code that looks at a layer's weight, its dtype or device."""
        return made_on_demand(self.dequantize(self.cast.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``... I`` to ``... O``."""
        return self.product(x, self.bias)


class PackedExperts(PackedWeight):
    """A fused expert parameter that is packed; ``parameter[e]`` is expert ``e``'s dense matrix.

    Models whose classes leave a choice how experts are run use :meth:`grouped` (:mod:`expert_products`), and so do the
    other classes of transformers (:mod:`own_experts`). Code that is not known asks for the matrix of one expert, or
    gets all of them (``torch.bmm(x, parameter)``), made when they are asked for and gone afterwards.
    """

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """The matrix of one expert, ``O I`` (``I O`` if the parameter is stored that way)."""
        parts = {name: part.unflatten(0, (self.site.experts, -1))[int(expert)] for name, part in self.parts.items()}
        w_OI = self.dense(parts, self.cast.dtype)
        return w_OI.T if self.site.transposed else w_OI

    def grouped(self, x_SI: Tensor, offsets_E: Tensor) -> Tensor:
        """``x w_e^T`` for tokens sorted by expert, ``S O``; zeros for those beyond the last expert's.

        Args:
            x_SI: The first expert's tokens first.
            offsets_E: int64, where each expert's tokens begin, and where the last one's end.
        """
        if torch.is_autocast_enabled(x_SI.device.type):
            x_SI = x_SI.to(torch.get_autocast_dtype(x_SI.device.type))
        if self.scheme.plain_symmetric:
            return grouped_packed_linear(x_SI, self.codes, self.scales, offsets_E, **self.layout)
        offsets, rows = offsets_E.tolist(), self.site.out_features
        y_SO = x_SI.new_zeros(len(x_SI), rows)
        for expert, (first, end) in enumerate(pairwise(offsets)):
            if end > first:
                own = slice(expert * rows, (expert + 1) * rows)
                parts = {name: part[own] for name, part in self.parts.items()}
                y_SO[first:end] = nn.functional.linear(x_SI[first:end], self.dense(parts, x_SI.dtype))
        return y_SO

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        if self.site.shape:
            return torch.Size(self.site.shape)
        matrix = (self.site.out_features, self.site.in_features)
        return torch.Size((self.site.experts, *(matrix[::-1] if self.site.transposed else matrix)))

    @property
    def mT(self) -> Tensor:
        """All matrices, dense and transposed."""
        return self.dequantize(self.cast.dtype).mT

    def transpose(self, first: int, second: int) -> Tensor:
        """The parameter, dense, with two dimensions exchanged."""
        return self.dequantize(self.cast.dtype).transpose(first, second)

    def view(self, *sizes: int) -> Tensor:
        """The parameter, dense, in another shape."""
        return self.dequantize(self.cast.dtype).view(*sizes)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Functions of torch that are given the packed weight get the dense one."""

        def dense(value: Any) -> Any:
            return value.dequantize(value.cast.dtype) if isinstance(value, PackedExperts) else value

        return function(*map(dense, args), **{name: dense(value) for name, value in (kwargs or {}).items()})
