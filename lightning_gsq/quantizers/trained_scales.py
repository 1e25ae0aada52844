"""Scales that train, in the form in which they are stored.

A layout that fixes the dtype of its floats trains every stored number by a float master: the forward pass rounds it as
the file will, the gradient passes through the rounding. What is stored at the end is what the last forward pass with
rounded codes computed. In a layout that leaves the dtype to the run, scales train in fp32 and are rounded once.

Masters move relative to what they stand for, so that one learning rate fits all: scales as ``s_0 exp(delta)``, the
others as ``x_0 + unit * delta``, with a unit of the number's own size, and at least of a share of its range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gsq.weights.layout import OFFSETS, SCALES, SUB_OFFSETS, SUB_SCALES
from lightning_gsq.weights.scheme import QuantScheme

LOG_SCALE = "log_scale"
SHIFTS = {name: f"{name}_shift" for name in (SUB_SCALES, OFFSETS, SUB_OFFSETS)}
"""Names of the parameters that move each stored number, beside :data:`LOG_SCALE`."""
SCALE_PARAMETERS = {LOG_SCALE, *SHIFTS.values()}
"""Last parts of the names of all parameters that are scales."""
LEAST_SHARE = 8
"""An integer moves at least in units of this part of its largest value: also one that starts at zero."""


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class TrainedScales(nn.Module):
    """The scales of one matrix; a base of what holds its codes.

    Args:
        scheme: Grid, groups, layout.
        parts: What is stored for the scales, by name, to start from.
    """

    start_scales: Tensor
    log_scale: nn.Parameter

    def __init__(self, scheme: QuantScheme, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.scheme = scheme
        self._names = tuple(parts)
        for name, value in parts.items():
            self.hold(f"start_{name}", value.float())
            parameter = nn.Parameter(torch.zeros_like(value, dtype=torch.float32))
            self.register_parameter(LOG_SCALE if name == SCALES else SHIFTS[name], parameter)

    def hold(self, name: str, value: Tensor) -> None:
        """Keeps a tensor that does not train."""
        self.register_buffer(name, value)

    def scale_parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [getattr(self, LOG_SCALE if name == SCALES else SHIFTS[name]) for name in self._names]

    def scale_parts(self) -> dict[str, Tensor]:
        """Every stored number as it stands, fp32; rounded where the layout fixes how, differentiable."""
        layout = self.scheme.layout
        parts = {}
        for name in self._names:
            value = self._master(name)
            if layout.dtype is not None:
                value = _Rounded.apply(value, layout.stored(name, value.detach(), torch.float32).float())
            parts[name] = value
        return parts

    @torch.no_grad()
    def stored_parts(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every number as it is stored; floats in ``dtype`` where the layout leaves it to the run."""
        return {name: self.scheme.layout.stored(name, self._master(name), dtype) for name in self._names}

    @torch.no_grad()
    def start_parts(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What :meth:`stored_parts` was at the start."""
        return {name: self.scheme.layout.stored(name, getattr(self, f"start_{name}"), dtype) for name in self._names}

    @property
    def scales_OG(self) -> Tensor:
        """The current scale of each group, fp32, differentiable."""
        return self.scheme.layout.scales(self.scale_parts())

    def _master(self, name: str) -> Tensor:
        start: Tensor = getattr(self, f"start_{name}")
        if name == SCALES:
            return start * self.log_scale.exp()
        shift: Tensor = getattr(self, SHIFTS[name])
        return start + self._unit(name, start) * shift

    def _unit(self, name: str, start: Tensor) -> Tensor:
        """What a shift of one means: the number's own size, and at least what changes weights about as much."""
        layout, values = self.scheme.layout, self.scheme.grid.values
        integers = {SUB_SCALES: layout.sub_scales, SUB_OFFSETS: layout.sub_offsets}.get(name)
        if integers is not None:
            return start.abs().clamp_min(integers.high / LEAST_SHARE)
        # An offset matters as much as the scale times half of the grid's range.
        least = self.start_scales.abs() * (values[-1] - values[0]) / 2
        if layout.sub_scales is None or layout.sub_offsets is None:
            return least
        return torch.maximum(start.abs(), least * layout.sub_scales.high / (LEAST_SHARE * layout.sub_offsets.high))
