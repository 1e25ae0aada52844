"""GPTQ: rounding column by column, with error feedback (Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers.layout_fit import GroupScales, ScaleFit
from lightning_gsq.quantizers.rtn import round_groups
from lightning_gsq.quantizers.scale_search import search_scale
from lightning_gsq.quantizers.warm_start import Start, WarmStart, check_inputs
from lightning_gsq.weights.scheme import QuantScheme

FOLLOW_DAMPING = 0.1
"""Ten times that of the rounding: less is nearer on the text it was found on, and further off on other text."""


class GPTQ(WarmStart):
    """Rounds column by column and moves each column's error into the columns that follow.

    Args:
        damping: Added to the Hessian's diagonal, as a share of its mean.
        block_columns: Columns handled before the rest of the matrix is updated; affects speed only.
        weighted: Choose a group's scale by the error weighted with the inputs' second moments; false for
            ``|error|^2.4`` alone.
        activation_order: Round the columns of the largest second moments first, so that others can make up for their
            errors. All scales are then chosen before the first column is rounded, since the columns of a group no
            longer follow each other; what is stored keeps its order.
        follow: Round the weights whose outputs come nearest to the full-precision model's for what enters them in the
            quantized one (:mod:`lightning_gsq.quantizers.following`), where ``model.target`` is ``stream``; false for
            the model's own weights, as published.
        follow_damping: Added to the Hessian's diagonal, as a share of its mean, where these weights are found; more
            of it keeps them nearer to the model's own.
    """

    def __init__(
        self,
        damping: float = 0.01,
        block_columns: int = 128,
        weighted: bool = True,
        activation_order: bool = True,
        follow: bool = False,
        follow_damping: float = FOLLOW_DAMPING,
    ) -> None:
        if not 0 < damping < 1:
            raise ConfigurationError(
                f"warm_start.damping must lie between 0 and 1 (a share of the mean diagonal), got {damping}"
            )
        if block_columns < 1:
            raise ConfigurationError(f"warm_start.block_columns must be positive, got {block_columns}")
        self.damping, self.block_columns, self.weighted = damping, block_columns, weighted
        self.activation_order = activation_order
        if not 0 < follow_damping < math.inf:
            raise ConfigurationError(
                f"warm_start.follow_damping must be positive (a share of the mean diagonal), got {follow_damping}; "
                "warm_start.follow false rounds the model's own weights"
            )
        self.following = follow_damping if follow else None

    def __call__(self, w_OI: Tensor, hessian_II: Tensor | None, scheme: QuantScheme) -> Start:
        """See :meth:`WarmStart.__call__`."""
        check_inputs(self, w_OI, hessian_II)
        if hessian_II is None:
            raise ConfigurationError("GPTQ needs the Hessian of the weight's inputs, got None")
        if not bool(hessian_II.any()):  # no token came here: there is nothing to be learned about these inputs
            return round_groups(w_OI.float(), scheme, None, self.scale)
        w_OI = w_OI.float().clone()
        # Damped as the Hessian is: an input that this text never used may matter on another.
        moment_I = hessian_II.diagonal()
        importance_I = moment_I + self.damping * moment_I.mean() if self.weighted else None
        rows, columns = w_OI.shape
        length = scheme.group_length(columns)
        grid, fit = scheme.grid, ScaleFit(scheme, importance_I, self.scale)
        order_I, fixed = torch.arange(columns, device=w_OI.device), None
        if self.activation_order:
            fixed = _scales_of_all(w_OI, fit)
            order_I = moment_I.argsort(descending=True, stable=True)
            w_OI, hessian_II = w_OI[:, order_I], hessian_II[order_I][:, order_I]
        group_of = (order_I // length).tolist()
        factor_II = inverse_cholesky(hessian_II, self.damping)
        pivots = factor_II.diagonal().tolist()
        w_IO = w_OI.T.contiguous()  # a column in one piece
        codes_IO, position_IO = torch.empty_like(w_IO), torch.empty_like(w_IO)
        for start in range(0, columns, self.block_columns):
            end = min(start + self.block_columns, columns)
            error_CO = w_IO.new_empty(end - start, rows)
            for c in range(start, end):
                if fixed is not None:
                    scale = fixed[group_of[c]]
                elif c % length == 0:
                    late = (error_CO[: c - start].T, factor_II, end)
                    if fit.begins_block(c):
                        fit.open_block(_current(w_IO.T, c, c + scheme.layout.block, *late), c)
                    scale = fit.groups(_current(w_IO.T, c, min(c + length, columns), *late), c)
                position_O = scale.position(w_IO[c])
                code_O = grid.nearest(position_O)
                position_IO[c], codes_IO[c] = grid.coordinate(position_O), code_O
                error_CO[c - start] = (w_IO[c] - scale.weight(grid.value_of(code_O))) / pivots[c]
                w_IO[c + 1 : end].addr_(factor_II[c, c + 1 : end], error_CO[c - start], alpha=-1)
            w_IO[end:].addmm_(factor_II[start:end, end:].T, error_CO, alpha=-1)
        scales_OG, others = fit.parts()
        back_I = order_I.argsort()
        return Start(
            codes_IO[back_I].T.to(grid.code_dtype).contiguous(), scales_OG, position_IO[back_I].T.contiguous(), others
        )

    def scale(self, w_OC: Tensor, scheme: QuantScheme, importance_C: Tensor | None) -> Tensor:
        """The scale of one group a row, ``O``."""
        return search_scale(w_OC, scheme, importance_C)


def _scales_of_all(w_OI: Tensor, fit: ScaleFit) -> list[GroupScales]:
    """The scales of every group for the weights as they are, in the order of the columns."""
    columns, scales = w_OI.shape[1], []
    for start in range(0, columns, fit.scheme.group_length(columns)):
        if fit.begins_block(start):
            fit.open_block(w_OI[:, start : start + fit.layout.block], start)
        scales.append(fit.groups(w_OI[:, start : start + fit.scheme.group_length(columns)], start))
    return scales


def _current(w_OI: Tensor, start: int, stop: int, error_OC: Tensor, factor_II: Tensor, end: int) -> Tensor:
    """Columns ``start ... stop`` as they stand after the columns before ``start``.

    Columns past ``end`` have not seen the errors ``error_OC`` of the block that ends there yet: they are applied.
    """
    if stop <= end or not error_OC.shape[1]:
        return w_OI[:, start:stop]
    late_OC = error_OC @ factor_II[start - error_OC.shape[1] : start, end:stop]
    return torch.cat([w_OI[:, start:end], w_OI[:, end:stop] - late_OC], dim=1)


def damped(hessian_II: Tensor, share: float) -> Tensor:
    """The Hessian with a share of its mean diagonal added to the diagonal."""
    diagonal_I = hessian_II.diagonal()
    return hessian_II + torch.diag(torch.full_like(diagonal_I, share * float(diagonal_I.mean())))


def inverse_cholesky(hessian_II: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    Inputs that were always zero get 1 on the diagonal: their weights are rounded to nearest, and their errors move no
    other weight. They may matter on other text.

    Raises:
        ConfigurationError: the Hessian is not finite, or not positive definite even with a hundred times the damping.
    """
    for lower_II in _factors(hessian_II, damping):
        upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
        if not failed:
            return upper_II
    raise _indefinite(damping)


def factor(hessian_II: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of the damped Hessian; inputs that were always zero, and errors, as above."""
    for lower_II in _factors(hessian_II, damping):
        return lower_II
    raise _indefinite(damping)


def _factors(hessian_II: Tensor, damping: float) -> Iterator[Tensor]:
    """Lower Cholesky factors of the Hessian with that damping, ten and a hundred times that, where there are any."""
    if not bool(torch.isfinite(hessian_II).all()):
        raise ConfigurationError("the Hessian is not finite: the model's activations overflow on the calibration text")
    alive_II = hessian_II + torch.diag((hessian_II.diagonal() == 0).to(hessian_II.dtype))
    for share in hessian_II.new_tensor([damping, 10 * damping, 100 * damping]).tolist():  # as precise as the Hessian
        lower_II, failed = torch.linalg.cholesky_ex(damped(alive_II, share))
        if not failed:
            yield lower_II


def _indefinite(damping: float) -> ConfigurationError:
    return ConfigurationError(
        f"the Hessian is not positive definite with damping up to {100 * damping}: raise warm_start.damping"
    )
