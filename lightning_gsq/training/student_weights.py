"""The quantized weights of the end-to-end phase: frozen codes, trainable scales; codes too where asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.ops.scaled_codes import scaled_codes
from lightning_gsq.quantizers import GumbelOptions, Start
from lightning_gsq.quantizers.salient_start import mixed_tensor
from lightning_gsq.quantizers.trained_scales import TrainedScales
from lightning_gsq.quantizers.vector_gumbel import quantizer_of
from lightning_gsq.system.seeding import seed_of
from lightning_gsq.weights.layout import SCALES
from lightning_gsq.weights.mixed import MixedTensor, merge_order
from lightning_gsq.weights.quantized import QuantizedTensor, QuantizedWeight, expand_groups, scale_values

NEARLY_HARD = 1e-4
"""Temperature at which a sample is its most probable level up to rounding."""


class ScaledWeight(TrainedScales):
    """A weight matrix whose codes stay and whose scales train.

    Args:
        tensor: Codes and scales to start from.
    """

    codes: Tensor

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__(tensor.scheme, tensor.scale_parts)
        self.scale_dtype = tensor.scales_OG.dtype
        self.hold("codes", tensor.codes_OI)

    def hold(self, name: str, value: Tensor) -> None:
        """As a parameter rather than a buffer: DDP sends buffers with every step, and FSDP shards parameters only."""
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def group_scales(self) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets ``O G``, fp32: as they train, or as they are stored when nothing trains."""
        parts = self.scale_parts() if self.training else self.stored_parts(self.scale_dtype)
        return self.scheme.layout.scales(parts), self.scheme.layout.offsets(parts)

    def forward(self, key: tuple[int | str, ...], dtype: torch.dtype) -> Tensor:
        """The dense weight ``O I``; ``key`` is for weights that are sampled."""
        s_OG, o_OG = self.group_scales()
        columns = self.codes.shape[1]
        length, values_OI = self.scheme.group_length(columns), self.scheme.grid.value_of(self.codes)
        if o_OG is None:
            return scaled_codes(values_OI, s_OG, length, dtype)
        return (scaled_codes(values_OI, s_OG, length, torch.float32) + expand_groups(o_OG, columns, length)).to(dtype)

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """The quantized weight as it stands, its scales in their stored dtype."""
        parts = self.stored_parts(self.scale_dtype)
        return QuantizedTensor(self.codes.data, parts.pop(SCALES), self.scheme, parts)


class TableWeight(ScaledWeight):
    """A weight matrix whose groups share a table of scales, which trains.

    Args:
        tensor: Codes and scales to start from.
        table_n: The distinct scales.
        members_OG: Number of each group's scale.
    """

    def __init__(self, tensor: QuantizedTensor, table_n: Tensor, members_OG: Tensor) -> None:
        super().__init__(tensor)
        self.members = nn.Parameter(members_OG, requires_grad=False)
        self.start_scales = nn.Parameter(table_n.float(), requires_grad=False)
        self.log_scale = nn.Parameter(torch.zeros_like(self.start_scales))

    def group_scales(self) -> tuple[Tensor, None]:
        """The scales of all groups, fp32: as they train, or as they are stored when nothing trains."""
        table_n = self.start_scales * self.log_scale.exp() if self.training else self.table().float()
        return table_n[self.members.long()], None

    @torch.no_grad()
    def table(self) -> Tensor:
        """The distinct scales as they stand, in their stored dtype."""
        return (self.start_scales * self.log_scale.exp()).to(self.scale_dtype)

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """The quantized weight as it stands."""
        return QuantizedTensor(self.codes.data, self.table()[self.members.long()], self.scheme)


class SampledWeight(nn.Module):
    """A weight matrix whose codes train as well: hard samples, with the gradient of soft ones (straight through).

    Args:
        tensor: Codes and scales to start from.
        options: How the logits start and how noisy their samples are.
        generator: Source of the logits' initial noise.
    """

    def __init__(self, tensor: QuantizedTensor, options: GumbelOptions, generator: torch.Generator) -> None:
        super().__init__()
        others = {name: value.float() for name, value in tensor.others.items()}
        start = Start(tensor.codes_OI, tensor.scales_OG.float(), tensor.codes_OI.float(), others)
        self.scale_dtype = tensor.scales_OG.dtype
        self.quantizer = quantizer_of(start, tensor.scheme, options, generator)
        for name, buffer in list(self.quantizer.named_buffers()):  # for the same reason as in ScaledWeight
            setattr(self.quantizer, name, nn.Parameter(buffer, requires_grad=False))

    def forward(self, key: tuple[int | str, ...], dtype: torch.dtype) -> Tensor:
        """A hard sample ``O I`` whose noise ``key`` selects; the most probable codes when nothing trains."""
        quantizer = self.quantizer
        if not self.training:
            return self.tensor().dequantize(dtype)
        layout, parts = quantizer.scheme.layout, quantizer.scale_parts()
        s_OG, o_OG = layout.scales(parts), layout.offsets(parts)
        ones_OG, seed = torch.ones_like(s_OG), seed_of(*key)
        soft_OI = quantizer.sample(ones_OG, quantizer.logit_scale, quantizer.temperature, seed)
        with torch.no_grad():
            hard_OI = quantizer.exact(quantizer.sample(ones_OG, quantizer.logit_scale, NEARLY_HARD, seed))
        through_OI = soft_OI + (hard_OI - soft_OI).detach()
        return scale_values(through_OI, s_OG, o_OG, quantizer.group_length).to(dtype)

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """The quantized weight as it stands, its scales in their stored dtype."""
        return self.quantizer.harden(self.scale_dtype)


class MixedWeight(nn.Module):
    """A weight matrix with salient columns: one trainable weight for these, one for the others.

    Where the others share a table of scales, its entries train and each group keeps its number.

    Args:
        tensor: Codes and scales to start from.
        logits: Options of the logits if the codes train too.
        generator: Source of the logits' initial noise.
    """

    def __init__(self, tensor: MixedTensor, logits: GumbelOptions | None, generator: torch.Generator) -> None:
        super().__init__()
        self.scheme = tensor.scheme
        self.rest = trainable_weight(tensor.rest, logits, generator)
        self.salient = None if tensor.salient is None else trainable_weight(tensor.salient, logits, generator)
        if isinstance(self.rest, ScaledWeight) and tensor.table_n is not None and tensor.members_OG is not None:
            self.rest = TableWeight(tensor.rest, tensor.table_n, tensor.members_OG)
        # Parameters for the same reason as in ScaledWeight.
        self.columns = nn.Parameter(tensor.columns_K, requires_grad=False)
        self.order = nn.Parameter(merge_order(tensor.columns_K, tensor.rest.shape[1]), requires_grad=False)

    def forward(self, key: tuple[int | str, ...], dtype: torch.dtype) -> Tensor:
        """The dense weight ``O I``; ``key`` is for weights that are sampled."""
        rest_OR = self.rest(key, dtype)
        if self.salient is None:
            return rest_OR
        return torch.cat([rest_OR, self.salient((*key, "salient"), dtype)], dim=1).index_select(1, self.order)

    @torch.no_grad()
    def tensor(self) -> MixedTensor:
        """The quantized weight as it stands."""
        rest = self.rest.tensor()  # type: ignore[operator]
        salient = None if self.salient is None else self.salient.tensor()  # type: ignore[operator]
        if isinstance(self.rest, TableWeight):
            members_OG = self.rest.members.data
            return MixedTensor(self.columns.data, salient, rest, self.scheme, self.rest.table(), members_OG)
        coded = None if salient is None else (salient.codes_OI, salient.scales_OG)
        return mixed_tensor(
            self.columns.data, (rest.codes_OI, rest.scales_OG), coded, self.scheme, rest.scales_OG.dtype
        )


def trainable_weight(tensor: QuantizedWeight, logits: GumbelOptions | None, generator: torch.Generator) -> nn.Module:
    """The trainable form of a finished weight: its scales, and its codes too where ``logits`` is given.

    Raises:
        ConfigurationError: it is stored in the element layout.
    """
    if isinstance(tensor, MixedTensor):
        return MixedWeight(tensor, logits, generator)
    if not isinstance(tensor, QuantizedTensor):
        raise ConfigurationError(
            "model.phases: weights of the element layout are not trained end to end; use salient.layout structured"
        )
    return ScaledWeight(tensor) if logits is None else SampledWeight(tensor, logits, generator)
