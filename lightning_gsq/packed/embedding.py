"""An embedding whose table stays packed, and the head that is tied to it.

Looking a token up unpacks its row and no other. A tied head multiplies with the same codes: it holds no tensor of its
own, neither in memory nor in a file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.packed.layers import PackedWeight, made_on_demand
from lightning_gsq.weights.scheme import QuantScheme

FACTOR = "scalar_embed_scale"
"""Attribute of embeddings that multiply what they look up, as in Gemma 3."""


def is_packable_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows up and does nothing else to them than to multiply them by one factor."""
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, FACTOR))


class QuantEmbedding(PackedWeight):
    """Takes the place of ``nn.Embedding``.

    Args:
        scheme: Grid and group size.
        site: Shape: ``V`` rows of ``D``.
        original: What it takes the place of.
        scale_dtype: Dtype of the scales.
        dtype: Dtype of what is looked up; casting the module changes it.
        device: Where to make the buffers.
    """

    def __init__(
        self,
        scheme: QuantScheme,
        site: LinearSite,
        original: nn.Embedding,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(scheme, site, scale_dtype, dtype, device)
        self.num_embeddings, self.embedding_dim = site.out_features, site.in_features
        self.padding_idx = original.padding_idx
        self.factor: float | None = getattr(original, FACTOR, None)

    @property
    def weight(self) -> Tensor:
        """The dense table, made anew each time: for code that looks at its shape, dtype or device."""
        return made_on_demand(self.dequantize(self.cast.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of token ids: ``...`` to ``... D``."""
        flat = ids.flatten()
        rows_ND = self.dense({name: part[flat] for name, part in self.parts.items()}, self.cast.dtype)
        rows = rows_ND.view(*ids.shape, self.embedding_dim)
        # The factor is rounded to the dtype of the rows first, as where it comes from.
        return rows if self.factor is None else rows * torch.tensor(self.factor, dtype=rows.dtype, device=rows.device)


class TiedHead(nn.Module):
    """Takes the place of a head that is tied to a packed embedding.

    Args:
        table: The embedding.
        bias: Of the original head, or None.
    """

    def __init__(self, table: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # In a tuple, so that it is no part of this module: its tensors have one name and one place.
        self._table = (table,)
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The dense matrix, made anew each time."""
        return self._table[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """``... D`` to ``... V``."""
        return self._table[0].product(x, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def tie_heads(model: nn.Module) -> None:
    """Puts a :class:`TiedHead` in the place of every head that is tied to an embedding that has become packed.

    Args:
        model: A model of transformers, which keeps a list of what is tied; what is done here leaves it.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in list(tied.items()):
        table = model.get_submodule(source.rpartition(".")[0])
        if isinstance(table, QuantEmbedding):
            name = target.rpartition(".")[0]
            model.set_submodule(name, TiedHead(table, getattr(model.get_submodule(name), "bias", None)))
            del tied[target]
            settings: Any = model
            settings._tied_weights_keys = {k: v for k, v in (model._tied_weights_keys or {}).items() if k != target}  # type: ignore[union-attr,operator]
