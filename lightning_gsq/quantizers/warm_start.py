"""Where training starts: a code, a scale and an unrounded position for every weight.

Two warm starts, as classes so that each carries its own options: :class:`RTN` (round to nearest) and
:class:`GPTQ` (Frantar et al., arXiv 2210.17323). Both search each group's scale over shrink factors of the range
and over *both signs*: the grid -2 ... 1 is asymmetric, so that a negative scale is often the better one.

GPTQ is far the better end, RTN with weighted scales the better beginning: after training, blocks that started from it
have a lower error at every width tried (docs/results.md). GPTQ's codes answer to each other, which training undoes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

SHRINK_STEPS = 40
SMALLEST_SHRINK = 0.2
TINY = 1e-8
"""Floor of a scale's magnitude, so that a group of zeros divides by something."""


ScaleRule = Callable[[Tensor, QuantScheme, Tensor | None], Tensor]


@dataclass(frozen=True)
class Start:
    """The warm start of one weight matrix.

    Args:
        codes_OI: int8 levels.
        scales_OG: fp32.
        position_OI: fp32, the weight on the grid before rounding (``w / s``); for GPTQ after its error feedback.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    position_OI: Tensor


@dataclass(frozen=True)
class Matrix:
    """A weight matrix and what is known about its inputs.

    Args:
        w_OI: fp32 weight; the matrices of experts lie below one another.
        hessians: Mean of ``2 x xᵀ`` over the calibration inputs, one for each expert; None if they were not collected.
        scheme: How to quantize it.
        name: Its full parameter name, for warm starts that look weights up.
    """

    w_OI: Tensor
    hessians: list[Tensor] | None
    scheme: QuantScheme
    name: str = ""

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

    def check(self, weights: Mapping[str, tuple[QuantScheme, tuple[int, int]]]) -> None:  # noqa: B027 - a default
        """Verifies, before anything long, that every weight can be started; given scheme and ``(O, I)`` by name.

        Raises:
            ConfigurationError: one cannot.
        """


def start_of(matrix: Matrix, warm_start: WarmStart) -> Start:
    """The start of a whole matrix, each expert's own below one another."""
    return stack([warm_start.start(matrix.name, w, hessian, matrix.scheme) for w, hessian in matrix.parts()])


class RTN(WarmStart):
    """Round to nearest, each group's scale chosen for the smallest error.

    Args:
        weighted: Weigh each weight's squared error by its input's second moment (the diagonal of the Hessian), so
            that a scale clips where it does not matter; otherwise ``|error|^2.4`` of the weights alone.
    """

    def __init__(self, weighted: bool = False) -> None:
        self.needs_hessian = self.weighted = weighted

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`."""
        importance_I = hessian_II.diagonal() if self.weighted and hessian_II is not None else None
        return round_groups(w_OI, scheme, importance_I, search_scale)


class GPTQ(WarmStart):
    """Rounds column by column and moves each column's error into the columns that follow.

    Args:
        damping: Added to the Hessian's diagonal, as a share of its mean.
        block_columns: Columns handled before the rest of the matrix is updated; affects speed only.
        weighted: Choose a group's scale by the error weighted with the inputs' second moments rather than by
            ``|error|^2.4``.
    """

    def __init__(self, damping: float = 0.01, block_columns: int = 128, weighted: bool = False) -> None:
        if not 0 < damping < 1:
            raise ValueError(f"damping must lie between 0 and 1 (a share of the mean diagonal), got {damping}")
        if block_columns < 1:
            raise ValueError(f"block_columns must be positive, got {block_columns}")
        self.damping, self.block_columns, self.weighted = damping, block_columns, weighted

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`."""
        if hessian_II is None:
            raise ValueError("GPTQ needs the Hessian of the weight's inputs, got None")
        w_OI = w_OI.float().clone()
        importance_I = hessian_II.diagonal().clone() if self.weighted else None
        factor_II = inverse_cholesky(hessian_II, self.damping)
        w_OI[:, hessian_II.diagonal() == 0] = 0
        rows, columns = w_OI.shape
        length = scheme.group_length(columns)
        codes_OI, position_OI = torch.empty_like(w_OI), torch.empty_like(w_OI)
        scales = []
        for start in range(0, columns, self.block_columns):
            end = min(start + self.block_columns, columns)
            error_OC = w_OI.new_empty(rows, end - start)
            for c in range(start, end):
                if c % length == 0:
                    stop = min(c + length, columns)
                    # Columns past `end` have not seen this block's errors yet: apply them before the scale is read.
                    group_OC = w_OI[:, c:stop]
                    if stop > end and c > start:
                        late = error_OC[:, : c - start] @ factor_II[start:c, end:stop]
                        group_OC = torch.cat([w_OI[:, c:end], w_OI[:, end:stop] - late], dim=1)
                    scales.append(self.scale(group_OC, scheme, None if importance_I is None else importance_I[c:stop]))
                position_O = w_OI[:, c] / scales[-1]
                code_O = nearest_level(position_O, scheme)
                position_OI[:, c], codes_OI[:, c] = position_O, code_O
                error_O = (w_OI[:, c] - code_O * scales[-1]) / factor_II[c, c]
                w_OI[:, c + 1 : end] -= error_O[:, None] * factor_II[c, c + 1 : end]
                error_OC[:, c - start] = error_O
            w_OI[:, end:] -= error_OC @ factor_II[start:end, end:]
        return Start(codes_OI.to(torch.int8), torch.stack(scales, dim=1), position_OI)

    def scale(self, w_OC: Tensor, scheme: QuantScheme, importance_C: Tensor | None) -> Tensor:
        """The scale of one group a row, ``O``."""
        return search_scale(w_OC, scheme, importance_C)


def round_groups(w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor | None, scale: ScaleRule) -> Start:
    """Rounds to nearest, group by group.

    Args:
        w_OI: fp32 weight.
        scheme: Grid and group size.
        importance_I: Weights of the squared errors, one a column; None if there are none.
        scale: Finds the scale of one group a row from its weights, the scheme and the group's importance.
    """
    length = scheme.group_length(w_OI.shape[1])
    scales, positions = [], []
    for start in range(0, w_OI.shape[1], length):
        w_OC = w_OI[:, start : start + length]
        s_O = scale(w_OC, scheme, None if importance_I is None else importance_I[start : start + length])
        scales.append(s_O)
        positions.append(w_OC / s_O[:, None])
    position_OI = torch.cat(positions, dim=1)
    return Start(nearest_level(position_OI, scheme).to(torch.int8), torch.stack(scales, dim=1), position_OI)


def nearest_level(position: Tensor, scheme: QuantScheme) -> Tensor:
    """The level closest to each position on the grid, same dtype; ties round to even, binary zero to +1."""
    if scheme.bits == 1:
        return torch.where(position < 0, -1.0, 1.0).to(position.dtype)
    return position.round().clamp(scheme.low, scheme.high)


def search_scale(
    w_OC: Tensor, scheme: QuantScheme, importance_C: Tensor | None = None, exponent: float = 2.4
) -> Tensor:
    """The scale of one group a row: the smallest weighted error among shrunk ranges, both signs tried.

    Args:
        w_OC: fp32, the group's weights.
        scheme: The grid.
        importance_C: Weights of the squared errors, one a column; None for ``|error|^exponent`` unweighted.
        exponent: Used without ``importance_C``.

    Returns:
        fp32 scales ``O``, negative where a mirrored grid fits better; never zero.
    """
    top_O, bottom_O = w_OC.amax(1), w_OC.amin(1)
    bases = [torch.maximum(top_O / scheme.high, bottom_O / scheme.low)]
    if scheme.low != -scheme.high:
        bases.append(-torch.maximum(top_O / -scheme.low, bottom_O / -scheme.high))
    best_error_O = torch.full_like(top_O, torch.inf)
    best_O = torch.ones_like(top_O)
    shrinks = torch.linspace(1, SMALLEST_SHRINK, SHRINK_STEPS, dtype=w_OC.dtype)
    for base_O in bases:
        base_O = torch.where(base_O.abs() < TINY, TINY, base_O)
        for shrink in shrinks.tolist():
            s_O = base_O * shrink
            error_OC = w_OC - s_O[:, None] * nearest_level(w_OC / s_O[:, None], scheme)
            if importance_C is None:
                error_O = error_OC.abs_().pow_(exponent).sum(1)
            else:
                error_O = error_OC.square_() @ importance_C
            better_O = error_O < best_error_O
            best_error_O = torch.where(better_O, error_O, best_error_O)
            best_O = torch.where(better_O, s_O, best_O)
    return best_O


def inverse_cholesky(hessian_II: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian; dead inputs get 1 on the diagonal.

    Raises:
        ValueError: the Hessian is not finite, or not positive definite even with a hundred times the damping.
    """
    if not bool(torch.isfinite(hessian_II).all()):
        raise ValueError("the Hessian is not finite: the model's activations overflow on the calibration text")
    diagonal_I = hessian_II.diagonal()
    damped_II = hessian_II + torch.diag((diagonal_I == 0).to(hessian_II.dtype))
    mean = damped_II.diagonal().mean()
    for attempt in (damping, 10 * damping, 100 * damping):
        lower_II, failed = torch.linalg.cholesky_ex(
            damped_II + attempt * mean * torch.eye(len(diagonal_I), device=hessian_II.device)
        )
        if not failed:
            upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
            if not failed:
                return upper_II
    raise ValueError(f"the Hessian is not positive definite with damping up to {100 * damping}: raise `damping`")


def quantized(start: Start, scheme: QuantScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """The warm start as a finished weight, its scales rounded to the stored dtype."""
    return QuantizedTensor(start.codes_OI, start.scales_OG.to(scale_dtype), scheme)


def stack(starts: list[Start]) -> Start:
    """The starts of several matrices as one, row below row."""
    return Start(
        torch.cat([part.codes_OI for part in starts]),
        torch.cat([part.scales_OG for part in starts]),
        torch.cat([part.position_OI for part in starts]),
    )
