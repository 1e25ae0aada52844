"""Warm start of a matrix with salient columns: the rest first, the salient columns make up for its error.

Let R be the other columns and S the salient ones. For any rounding of R the best real-valued S is
``w_S + (w_R - q_R) H_RS H_SS^-1``, and what the error of R then still costs is measured by the Schur complement
``H_RR - H_RS H_SS^-1 H_SR``. So R is rounded with that Hessian, S is moved, and S is rounded with ``H_SS``: GPTQ with
the coarse columns in front, in which every column's error flows towards columns with more levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.quantizers import Start, WarmStart
from lightning_gsq.quantizers.dual_mode import group_scalars
from lightning_gsq.quantizers.warm_start import quantized, stack
from lightning_gsq.weights.mixed import MixedTensor, other_columns
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

Coded = tuple[Tensor, Tensor]
"""Codes ``O I`` and scales ``O G``."""
DAMPING = 0.01
"""Share of the mean diagonal added to the Hessian of the salient columns before it is inverted."""


@dataclass(frozen=True)
class MixedStart:
    """The warm start of one matrix with salient columns.

    Args:
        columns_K: int64, the salient columns, rising.
        rest: The other columns.
        salient: The salient columns; None if there are none.
    """

    columns_K: Tensor
    rest: Start
    salient: Start | None


def mixed_start(
    w_OI: Tensor, hessian_II: Tensor | None, columns_K: Tensor, scheme: QuantScheme, warm_start: WarmStart
) -> MixedStart:
    """Quantizes both parts of one matrix.

    Args:
        w_OI: fp32 weight.
        hessian_II: fp32 mean of ``2 x xᵀ``; None rounds both parts on their own.
        columns_K: The salient columns.
        scheme: Settled, structured.
        warm_start: Quantizes one part.
    """
    assert scheme.salient is not None
    rest_R = other_columns(columns_K, w_OI.shape[1])
    rest_OR, salient_OK = w_OI[:, rest_R], w_OI[:, columns_K]
    if hessian_II is None:
        rest = warm_start(rest_OR, None, scheme.plain)
        salient = warm_start(salient_OK, None, scheme.salient_scheme) if len(columns_K) else None
        return MixedStart(columns_K, rest, salient)
    h_RR = hessian_II[rest_R][:, rest_R]
    if not len(columns_K):
        return MixedStart(columns_K, warm_start(rest_OR, h_RR, scheme.plain), None)
    h_RK, h_KK = hessian_II[rest_R][:, columns_K], hessian_II[columns_K][:, columns_K]
    damping = DAMPING * hessian_II.diagonal().mean().clamp_min(1e-12)
    transfer_RK = torch.linalg.solve(h_KK + damping * torch.eye(len(columns_K), device=h_KK.device), h_RK.T).T
    schur_RR = h_RR - transfer_RK @ h_RK.T
    # An input that is always zero stays one that the warm start recognises.
    dead_R = h_RR.diagonal() == 0
    schur_RR = torch.where(dead_R[:, None] | dead_R, 0, (schur_RR + schur_RR.T) / 2)
    rest = warm_start(rest_OR, schur_RR, scheme.plain)
    error_OR = rest_OR - quantized(rest, scheme.plain, torch.float32).dequantize()
    salient = warm_start(salient_OK + error_OR @ transfer_RK, h_KK, scheme.salient_scheme)
    return MixedStart(columns_K, rest, salient)


def stack_starts(starts: list[MixedStart]) -> MixedStart:
    """The starts of matrices that share their columns, such as the experts of one parameter, as one matrix."""
    salient = [part.salient for part in starts if part.salient is not None]
    return MixedStart(starts[0].columns_K, stack([part.rest for part in starts]), stack(salient) if salient else None)


def mixed_tensor(
    columns_K: Tensor, rest: Coded, salient: Coded | None, scheme: QuantScheme, scale_dtype: torch.dtype
) -> MixedTensor:
    """Finished weights from the codes and scales of both parts; finds the table of scales where the scheme has one."""
    assert scheme.salient is not None
    salient_tensor = None
    if salient is not None:
        salient_tensor = QuantizedTensor(salient[0], salient[1].to(scale_dtype), scheme.salient_scheme)
    count = scheme.salient.scale_groups
    if not isinstance(count, int):
        plain = QuantizedTensor(rest[0], rest[1].to(scale_dtype), scheme.plain)
        return MixedTensor(columns_K, salient_tensor, plain, scheme)
    table_n, members_OG = scale_table(rest[1], count, scale_dtype)
    plain = QuantizedTensor(rest[0], table_n[members_OG.long()], scheme.plain)
    return MixedTensor(columns_K, salient_tensor, plain, scheme, table_n, members_OG)


def scale_table(scales_OG: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``count`` scales for a whole matrix, and the number of the one nearest to each group's, uint8 ``O G``."""
    groups = group_scalars(scales_OG, count)
    table_n = groups.scalars_n
    if len(table_n) < count:  # fewer distinct scales than entries
        table_n = torch.cat([table_n, table_n[-1:].expand(count - len(table_n))])
    return table_n.to(dtype), groups.members.to(torch.uint8)
