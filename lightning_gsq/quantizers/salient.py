"""A matrix with salient columns as trainable choices: two Gumbel quantizers over a partition of the columns.

The unsalient signs and their group scales are the binary GSQ scheme (arXiv 2604.18556), the salient columns a grid of
several bits with local shifts; both are sampled and trained together against the block's output. Scales train freely;
where a matrix has a table of scales, they are sorted into it whenever the weight is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_gsq.quantizers import GumbelOptions, GumbelQuantizer
from lightning_gsq.quantizers.salient_start import MixedStart, mixed_tensor
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.system.seeding import seed_of
from lightning_gsq.weights.mixed import MixedTensor, merge_order
from lightning_gsq.weights.scheme import QuantScheme


class MixedQuantizer(nn.Module):
    """The salient and the other columns of one weight matrix.

    Args:
        start: The warm start of both.
        scheme: Settled, structured.
        options: How logits start.
        generator: Source of the logits' initial noise, on the CPU.
    """

    columns_K: Tensor
    order_I: Tensor
    fixed_OK: Tensor

    def __init__(
        self, start: MixedStart, scheme: QuantScheme, options: GumbelOptions, generator: torch.Generator
    ) -> None:
        super().__init__()
        assert scheme.salient is not None
        self.scheme = scheme
        self.rest = GumbelQuantizer(start.rest, scheme.plain, options, generator)
        self.salient, self.fixed = None, None
        if start.salient is not None and scheme.salient.trained:
            self.salient = GumbelQuantizer(start.salient, scheme.salient_scheme, options, generator)
        elif start.salient is not None:
            self.fixed = start.salient
            dense = quantized(start.salient, scheme.salient_scheme, torch.float32).dequantize()
            self.register_buffer("fixed_OK", dense)
        self.register_buffer("columns_K", start.columns_K)
        self.register_buffer("order_I", merge_order(start.columns_K, start.rest.codes_OI.shape[1]))

    def parts(self) -> Iterator[tuple[str, GumbelQuantizer]]:
        """What is trained, with a suffix for the weight's name."""
        yield "", self.rest
        if self.salient is not None:
            yield ".salient", self.salient

    def forward(self, seed: int) -> Tensor:
        """Samples the weight ``O I``; the same seed draws the same noise."""
        rest_OR = self.rest(seed)
        if self.salient is not None:
            salient_OK = self.salient(seed_of(seed, "salient"))
        elif self.fixed is not None:
            salient_OK = self.fixed_OK
        else:
            return rest_OR
        return torch.cat([rest_OR, salient_OK], dim=1).index_select(1, self.order_I)

    @torch.no_grad()
    def harden(self, scale_dtype: torch.dtype = torch.float32) -> MixedTensor:
        """The quantized weight as it stands."""
        return self._tensor(scale_dtype, lambda part: (part.codes_OI(), part.scales_OG))

    @torch.no_grad()
    def start_tensor(self, scale_dtype: torch.dtype = torch.float32) -> MixedTensor:
        """The quantized weight of the warm start."""
        return self._tensor(scale_dtype, lambda part: (part.start_codes, part.start_scales))

    @torch.no_grad()
    def blend(self, trained_O: Tensor, scale_dtype: torch.dtype = torch.float32) -> MixedTensor:
        """Rows as they stand where ``trained_O`` (bool) is true, as the warm start left them elsewhere.

        Where the matrix has a table of scales, those of all rows are sorted into one table.
        """
        trained_O1 = trained_O.to(self.order_I.device)[:, None]

        def rows(part: GumbelQuantizer) -> tuple[Tensor, Tensor]:
            codes_OI = torch.where(trained_O1, part.codes_OI(), part.start_codes)
            return codes_OI, torch.where(trained_O1, part.scales_OG, part.start_scales)

        return self._tensor(scale_dtype, rows)

    def _tensor(
        self, scale_dtype: torch.dtype, read: Callable[[GumbelQuantizer], tuple[Tensor, Tensor]]
    ) -> MixedTensor:
        rest = read(self.rest)
        salient = (self.fixed.codes_OI, self.fixed.scales_OG) if self.fixed is not None else None
        if self.salient is not None:
            salient = read(self.salient)
        return mixed_tensor(self.columns_K, rest, salient, self.scheme, scale_dtype)
