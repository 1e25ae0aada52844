"""The quantized weights of the end-to-end phase: frozen codes, trainable scales; codes too where asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.ops.rounded_positions import rounded_positions
from lightning_gsq.ops.scaled_codes import scaled_codes
from lightning_gsq.quantizers.salient_start import mixed_tensor
from lightning_gsq.quantizers.trained_scales import TrainedScales
from lightning_gsq.quantizers.warm_start import start_at
from lightning_gsq.weights.layout import SCALES
from lightning_gsq.weights.mixed import MixedTensor, merge_order, other_columns
from lightning_gsq.weights.quantized import QuantizedTensor, QuantizedWeight, expand_groups

MARGIN = 0.02
"""Least distance, in codes, of a position from the border of its cell at the start."""


class StudentWeight(TrainedScales, ABC):
    """A weight matrix whose scales train.

    Args:
        tensor: Codes and scales to start from.
    """

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__(tensor.scheme, tensor.scale_parts)
        self.scale_dtype = tensor.scales_OG.dtype

    def hold(self, name: str, value: Tensor) -> None:
        """As a parameter rather than a buffer: DDP sends buffers with every step, and FSDP shards parameters only."""
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def group_scales(self) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets ``O G``, fp32: as they train, or as they are stored when nothing trains."""
        parts = self.scale_parts() if self.training else self.stored_parts(self.scale_dtype)
        return self.scheme.layout.scales(parts), self.scheme.layout.offsets(parts)

    @abstractmethod
    def codes_now(self) -> Tensor:
        """The codes ``O I`` as they stand."""

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """The quantized weight as it stands, its scales in their stored dtype."""
        parts = self.stored_parts(self.scale_dtype)
        return QuantizedTensor(self.codes_now(), parts.pop(SCALES), self.scheme, parts)


class ScaledWeight(StudentWeight):
    """A weight matrix whose codes stay and whose scales train.

    Args:
        tensor: Codes and scales to start from.
    """

    codes: Tensor

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__(tensor)
        self.hold("codes", tensor.codes_OI)

    def codes_now(self) -> Tensor:
        """Those of the start."""
        return self.codes.data

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dense weight ``O I``."""
        s_OG, o_OG = self.group_scales()
        columns = self.codes.shape[1]
        length, values_OI = self.scheme.group_length(columns), self.scheme.grid.value_of(self.codes)
        if o_OG is None:
            return scaled_codes(values_OI, s_OG, length, dtype)
        return (scaled_codes(values_OI, s_OG, length, torch.float32) + expand_groups(o_OG, columns, length)).to(dtype)


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


class MovingWeight(StudentWeight):
    """A weight matrix whose codes train as well: each weight has a position between the codes, and the nearest is its.

    Positions begin where the full-precision weight lies, moved into the cell of the code that the blocks phase chose:
    at the start, every code is the one it was.

    Args:
        tensor: Codes and scales to start from.
        original_OI: The full-precision weight.
    """

    def __init__(self, tensor: QuantizedTensor, original_OI: Tensor) -> None:
        super().__init__(tensor)
        self.code_dtype = tensor.codes_OI.dtype
        self.positions = nn.Parameter(start_positions(tensor, original_OI))

    @torch.no_grad()
    def codes_now(self) -> Tensor:
        """The nearest to each position."""
        return self.scheme.grid.code_at(self.positions).to(self.code_dtype)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dense weight ``O I``."""
        s_OG, o_OG = self.group_scales()
        length = self.scheme.group_length(self.positions.shape[1])
        return rounded_positions(self.positions, s_OG, o_OG, self.scheme.grid, length, dtype)


@torch.no_grad()
def start_positions(tensor: QuantizedTensor, original_OI: Tensor) -> Tensor:
    """Where each weight lies between the codes, fp32, and at least :data:`MARGIN` within its own code's cell.

    Args:
        tensor: Codes and scales.
        original_OI: The full-precision weight.
    """
    start, half = start_at(tensor, original_OI.float()), tensor.scheme.grid.step / 2 - MARGIN
    codes_OI = start.codes_OI.float()
    return start.position_OI.clamp(codes_OI - half, codes_OI + half)


class MixedWeight(nn.Module):
    """A weight matrix with salient columns: one trainable weight for these, one for the others.

    Where the others share a table of scales, its entries train and each group keeps its number.

    Args:
        tensor: Codes and scales to start from.
        original_OI: The full-precision weight if the codes train too.
    """

    def __init__(self, tensor: MixedTensor, original_OI: Tensor | None) -> None:
        super().__init__()
        self.scheme = tensor.scheme
        rest = salient = None
        if original_OI is not None:
            rest_R = other_columns(tensor.columns_K, original_OI.shape[1])
            rest, salient = original_OI[:, rest_R], original_OI[:, tensor.columns_K]
        self.rest = trainable_weight(tensor.rest, rest)
        self.salient = None if tensor.salient is None else trainable_weight(tensor.salient, salient)
        if original_OI is None and tensor.table_n is not None and tensor.members_OG is not None:
            self.rest = TableWeight(tensor.rest, tensor.table_n, tensor.members_OG)
        # Parameters for the same reason as in ScaledWeight.
        self.columns = nn.Parameter(tensor.columns_K, requires_grad=False)
        self.order = nn.Parameter(merge_order(tensor.columns_K, tensor.rest.shape[1]), requires_grad=False)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dense weight ``O I``."""
        rest_OR = self.rest(dtype)
        if self.salient is None:
            return rest_OR
        return torch.cat([rest_OR, self.salient(dtype)], dim=1).index_select(1, self.order)

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


def trainable_weight(tensor: QuantizedWeight, original_OI: Tensor | None) -> nn.Module:
    """The trainable form of a finished weight: its scales, and its codes too where the original is given.

    Raises:
        ConfigurationError: it is stored in the element layout.
    """
    if isinstance(tensor, MixedTensor):
        return MixedWeight(tensor, original_OI)
    if not isinstance(tensor, QuantizedTensor):
        raise ConfigurationError(
            "model.phases: weights of the element layout are not trained end to end; use salient.layout structured"
        )
    if original_OI is None:
        return ScaledWeight(tensor)
    return MovingWeight(tensor, original_OI)
