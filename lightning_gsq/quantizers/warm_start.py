"""Where training starts: a code, a scale and an unrounded position for every weight.

Warm starts are classes, so that each carries its own options. GPTQ is far the better end, and RTN with weighted scales
the better beginning where much is trained: GPTQ's codes answer to each other, which training undoes. Where little is,
at 3 bits, GPTQ is the better beginning as well (docs/results.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.layout import SCALES
from lightning_gsq.weights.quantized import QuantizedTensor, expand_groups
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.vector_grid import VectorGrid


@dataclass(frozen=True)
class Start:
    """The warm start of one weight matrix.

    Args:
        codes_OI: Codes of the scheme's grid.
        scales_OG: fp32, one a group; one a block under a two-level layout.
        position_OI: fp32, where the weight lies between the codes before rounding (``w / s`` on a grid whose codes are
            their own values); for GPTQ after its error feedback.
        others: What the scheme's layout stores beside the scales, by name, fp32.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    position_OI: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def scale_parts(self) -> dict[str, Tensor]:
        """Everything that is stored for the scales, by name, fp32."""
        return {SCALES: self.scales_OG, **self.others}


@dataclass(frozen=True)
class Matrix:
    """A weight matrix and what is known about its inputs.

    Args:
        w_OI: fp32 weight; the matrices of experts lie below one another.
        hessians: Mean of ``2 x xᵀ`` over the calibration inputs, one for each expert; None if they were not collected.
        scheme: How to quantize it.
        name: Its full parameter name, for warm starts that look weights up and for messages.

    Raises:
        ConfigurationError: a weight, or the second moment of an input, is not finite or of another shape.
    """

    w_OI: Tensor
    hessians: list[Tensor] | None
    scheme: QuantScheme
    name: str = ""

    def __post_init__(self) -> None:
        self._check_shapes()
        if not bool(torch.isfinite(self.w_OI).all()):
            count = int((~torch.isfinite(self.w_OI)).sum())
            raise ConfigurationError(
                f"model.pretrained: {count} of the {self.w_OI.numel()} values of {self.name or 'a weight'} are not "
                "finite: the model is damaged, or its dtype is too narrow (--model.dtype float32)"
            )
        if self.hessians is not None and not all(bool(torch.isfinite(part).all()) for part in self.hessians):
            raise ConfigurationError(
                f"model: the inputs of {self.name or 'a weight'} are not finite on the calibration text: activations "
                "overflow (--model.dtype float32 or bfloat16), or the model is damaged"
            )

    def _check_shapes(self) -> None:
        name = self.name or "a weight"
        if self.w_OI.ndim != 2:
            raise ConfigurationError(f"{name}: expected a matrix (O, I), got shape {tuple(self.w_OI.shape)}")
        wanted = (self.w_OI.shape[1],) * 2
        for part in self.hessians or ():
            if tuple(part.shape) != wanted:
                raise ConfigurationError(f"{name}: expected Hessians of shape {wanted}, got {tuple(part.shape)}")
        if self.hessians is not None and (not self.hessians or len(self.w_OI) % len(self.hessians)):
            raise ConfigurationError(f"{name}: {len(self.w_OI)} rows are not {len(self.hessians)} matrices of one size")

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and Hessian of each expert's matrix."""
        if self.hessians is None:
            yield self.w_OI, None
        else:
            yield from zip(self.w_OI.chunk(len(self.hessians)), self.hessians, strict=True)


class WarmStart(ABC):
    """Turns a weight and the second moments of its inputs into a :class:`Start`."""

    needs_hessian: bool = True
    """Whether calibration inputs have to be collected at all."""
    diagonal_only: bool = False
    """Whether the Hessian's diagonal is all that counts, so that an importance matrix can take its place."""
    following: float | None = None
    """Damping of the weights that follow the full-precision model (:mod:`lightning_gsq.quantizers.following`), which it
    rounds in place of the model's own; None where it rounds these."""

    @property
    def rule(self) -> WarmStart:
        """The start that does the rounding: this one, or one that it hands weights to."""
        return self

    @abstractmethod
    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """Quantizes one matrix.

        Args:
            w_OI: fp32 weight.
            hessian_II: fp32 mean of ``2 x xᵀ`` over the calibration inputs; None if there is none.
            scheme: Grid and group size.
        """

    def start(self, name: str, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """The start of the weight of that name in the model; by default the name does not matter."""
        return self(w_OI, hessian_II, scheme)

    def check(self, weights: Mapping[str, tuple[QuantScheme, tuple[int, int]]]) -> None:
        """Verifies, before anything long, that every weight can be started; given scheme and ``(O, I)`` by name.

        Raises:
            ConfigurationError: one cannot; by default, one with code vectors.
        """
        for name, (scheme, _) in weights.items():
            if isinstance(scheme.grid, VectorGrid):
                raise ConfigurationError(
                    f"model.warm_start: {type(self).__name__} rounds weights one by one, and {name} is {scheme}, whose "
                    "weights are code vectors; use --model.warm_start LeastSquares, LlamaCpp, or FromFile with a GGUF "
                    "file of them"
                )


def check_inputs(warm_start: WarmStart, w_OI: Any, hessian_II: Any) -> None:
    """Verifies what a warm start is called with, for those who call one themselves.

    Raises:
        ConfigurationError: no matrix of floating-point numbers, or a Hessian of another size or in 16 bits.
    """
    name = type(warm_start).__name__
    if not isinstance(w_OI, Tensor) or w_OI.ndim != 2 or not w_OI.is_floating_point():
        raise ConfigurationError(f"{name}: w_OI: expected an fp32 matrix (O, I), got {_described(w_OI)}")
    wanted = (w_OI.shape[1],) * 2
    wide = (torch.float32, torch.float64)
    if hessian_II is not None and (
        not isinstance(hessian_II, Tensor) or tuple(hessian_II.shape) != wanted or hessian_II.dtype not in wide
    ):
        raise ConfigurationError(f"{name}: hessian_II: expected fp32 of shape {wanted}, got {_described(hessian_II)}")


def start_of(matrix: Matrix, warm_start: WarmStart) -> Start:
    """The start of a whole matrix, each expert's own below one another.

    Raises:
        ConfigurationError: what the warm start gives is no start of that matrix.
    """
    starts = []
    for w_OI, hessian_II in matrix.parts():
        starts.append(warm_start.start(matrix.name, w_OI, hessian_II, matrix.scheme))
        _check_start(warm_start, starts[-1], w_OI)
    return stack(starts)


def _check_start(warm_start: WarmStart, start: Any, w_OI: Tensor) -> None:
    name, shape = f"model.warm_start: {type(warm_start).__name__}", tuple(w_OI.shape)
    if not isinstance(start, Start):
        raise ConfigurationError(f"{name}: expected a Start, got {type(start).__name__}")
    for part, value in (("codes_OI", start.codes_OI), ("position_OI", start.position_OI)):
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            raise ConfigurationError(f"{name}: {part}: expected shape {shape}, got {_described(value)}")
    if start.codes_OI.is_floating_point():
        raise ConfigurationError(f"{name}: codes_OI: expected int8, got {start.codes_OI.dtype}")
    if not isinstance(start.scales_OG, Tensor) or start.scales_OG.ndim != 2 or len(start.scales_OG) != shape[0]:
        raise ConfigurationError(
            f"{name}: scales_OG: expected a row for each of the {shape[0]} rows, got {_described(start.scales_OG)}"
        )


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def quantized(start: Start, scheme: QuantScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """The warm start as a finished weight, its scales in their stored form."""
    parts = {name: scheme.layout.stored(name, value, scale_dtype) for name, value in start.scale_parts.items()}
    return QuantizedTensor(start.codes_OI, parts.pop(SCALES), scheme, parts)


def start_at(tensor: QuantizedTensor, w_OI: Tensor) -> Start:
    """The start at a finished weight: its codes and scales; positions are where other weights lie on that grid.

    Args:
        tensor: The finished weight.
        w_OI: fp32, the weights that it is to stand for.
    """
    tensor = tensor.map(lambda part: part.to(w_OI.device))
    parts = {part: value.float() for part, value in tensor.scale_parts.items()}
    layout, columns, length = tensor.scheme.layout, w_OI.shape[1], tensor.group_length
    s_OI, o_OG = expand_groups(layout.scales(parts), columns, length), layout.offsets(parts)
    lifted_OI = w_OI if o_OG is None else w_OI - expand_groups(o_OG, columns, length)
    # A group of zeros has a scale of zero: its weights lie on any of its levels.
    codes_OI = tensor.codes_OI.float()
    position_OI = torch.where(s_OI == 0, codes_OI, tensor.scheme.grid.coordinate(lifted_OI / s_OI))
    return Start(tensor.codes_OI, parts.pop(SCALES), position_OI, parts)


def unstack(start: Start, count: int) -> Iterator[Start]:
    """The starts of so many matrices of one size that :func:`stack` put below one another."""
    parts = {name: value.chunk(count) for name, value in start.others.items()}
    columns = zip(
        start.codes_OI.chunk(count), start.scales_OG.chunk(count), start.position_OI.chunk(count), strict=True
    )
    for number, (codes_OI, scales_OG, position_OI) in enumerate(columns):
        yield Start(codes_OI, scales_OG, position_OI, {name: parts[name][number] for name in parts})


def stack(starts: list[Start]) -> Start:
    """The starts of several matrices as one, row below row."""
    return Start(
        torch.cat([part.codes_OI for part in starts]),
        torch.cat([part.scales_OG for part in starts]),
        torch.cat([part.position_OI for part in starts]),
        {name: torch.cat([part.others[name] for part in starts]) for name in starts[0].others},
    )
