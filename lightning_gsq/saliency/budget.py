"""Spending a budget of true bits over the matrices of a block.

Each matrix has a menu: group size, bits of the salient columns, how many of them. An entry costs bits, counted as they
are stored, and leaves an error: the squared error of plain rounding, weighed by the inputs' second moments and relative
to the output's energy. The sum of errors is minimised for a total of bits by a price per bit, the same for all matrices
(Lagrange), which is bisected; what is then left over goes to the upgrades with the most gain a bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers.dual_mode import fit_scale
from lightning_gsq.quantizers.rtn import round_groups
from lightning_gsq.saliency.graph import GraphOptions
from lightning_gsq.weights.mixed import mixed_like
from lightning_gsq.weights.packing import index_bits
from lightning_gsq.weights.quantized import BitsLedger
from lightning_gsq.weights.salient_part import SalientPart, column_count, column_step
from lightning_gsq.weights.scheme import QuantScheme

MAX_RATIO = 0.3
"""Largest salient ratio of a search, unless asked otherwise."""


@dataclass(frozen=True)
class Menu:
    """What may be chosen for a matrix.

    Args:
        group_sizes: Unsalient weights that share one scale.
        salient_bits: Bits of salient weights.
        max_ratio: Largest share of salient columns.
        scale_groups: Distinct scales of the unsalient weights of a matrix; null for one 16-bit scale a group.
    """

    group_sizes: Sequence[int] = (32, 64, 128)
    salient_bits: Sequence[int] = (2, 3, 4)
    max_ratio: float = 0.5
    scale_groups: int | None = 16

    def __post_init__(self) -> None:
        if not self.group_sizes or not self.salient_bits:
            raise ConfigurationError("menu.group_sizes and menu.salient_bits must not be empty")
        if not 0 <= self.max_ratio < 1:
            raise ConfigurationError(f"menu.max_ratio must be a share, 0 to below 1, got {self.max_ratio}")


@dataclass(frozen=True)
class Option:
    """One entry of a matrix's menu.

    Args:
        scheme: Settled.
        columns_K: The salient columns, rising.
        error: Relative squared error.
        bits: All bits of the matrix.
    """

    scheme: QuantScheme
    columns_K: Tensor
    error: float
    bits: int


def mixed_bits(rows: int, in_features: int, scheme: QuantScheme, scale_dtype: torch.dtype = torch.float16) -> int:
    """True bits of a matrix in the structured layout; equals its ledger."""
    return 8 * sum(part.nbytes for part in mixed_like(scheme, rows, in_features, scale_dtype).values())


def planned_ledger(
    rows: int, in_features: int, scheme: QuantScheme, scale_dtype: torch.dtype = torch.float16
) -> BitsLedger:
    """At most what a matrix will cost, before anything is known of it; what is left open counts as the dearest choice.

    Only the total means something: it stands with the codes.
    """
    weights, part = rows * in_features, scheme.salient
    if scheme.budget is not None:
        return BitsLedger(weights, int(weights * scheme.budget))
    assert part is not None
    ratio = MAX_RATIO if part.ratio is None else part.ratio
    groups = part.scale_groups
    if groups == "graph" or (groups is None and part.layout == "element"):
        groups = GraphOptions().max_groups
    if part.layout == "element":
        assert groups is not None
        codes = 1 + index_bits(groups) + ratio * part.bits
        return BitsLedger(weights, int(weights * (codes + 1) + 8 * scale_dtype.itemsize * (rows + groups)))
    ratio = column_count(ratio, in_features) / in_features
    settled = dataclasses.replace(scheme, salient=dataclasses.replace(part, ratio=ratio, scale_groups=groups))
    return BitsLedger(weights, mixed_bits(rows, in_features, settled, scale_dtype))


def column_errors(w_OI: Tensor, moment_I: Tensor, scheme: QuantScheme) -> Tensor:
    """Weighted squared error of each column after plain rounding, ``I``."""
    start = round_groups(w_OI, scheme, moment_I, fit_scale)
    length = scheme.group_length(w_OI.shape[1])
    s_OI = start.scales_OG.repeat_interleave(length, 1)[:, : w_OI.shape[1]]
    return (w_OI - s_OI * scheme.grid.nearest(start.position_OI)).square().sum(0) * moment_I


def options_of(w_OI: Tensor, moment_I: Tensor, scheme: QuantScheme, menu: Menu) -> list[Option]:
    """Every entry of a matrix's menu; the salient columns are those whose error falls most."""
    rows, in_features = w_OI.shape
    energy = float((w_OI.square().sum(0) * moment_I).sum().clamp_min(1e-30))
    step = column_step(in_features)
    counts = range(0, min(int(menu.max_ratio * in_features), in_features - 1) + 1, step)
    options = []
    several = {bits: column_errors(w_OI, moment_I, QuantScheme(bits, -1)) for bits in menu.salient_bits}
    for size in menu.group_sizes:
        few_I = column_errors(w_OI, moment_I, QuantScheme(scheme.bits, size))
        for bits, many_I in several.items():
            order_I = (few_I - many_I).argsort(descending=True, stable=True)
            saved_I = (few_I - many_I)[order_I].cumsum(0)
            for count in counts:
                if count == 0 and bits != menu.salient_bits[0]:
                    continue
                part = SalientPart("structured", bits, count / in_features, "error", -1, menu.scale_groups)
                settled = QuantScheme(scheme.bits, size, part)
                error = float(few_I.sum() - (saved_I[count - 1] if count else 0)) / energy
                columns_K = order_I[:count].sort().values
                options.append(Option(settled, columns_K, error, mixed_bits(rows, in_features, settled)))
    return options


def spend(menus: Sequence[list[Option]], limit: int) -> list[Option]:
    """One entry of each menu, with the least sum of errors within ``limit`` bits.

    Raises:
        ConfigurationError: even the cheapest entries cost more.
    """
    cheapest = sum(min(option.bits for option in menu) for menu in menus)
    if cheapest > limit:
        raise ConfigurationError(
            f"model.scheme.budget: {limit} bits do not hold even the cheapest choice, {cheapest} bits; raise it "
            f"by {cheapest / limit - 1:.1%} or allow larger groups in model.saliency.menu"
        )
    tables = [
        (torch.tensor([o.error for o in menu]).double(), torch.tensor([o.bits for o in menu]).double())
        for menu in menus
    ]

    def at(price: float) -> list[int]:
        return [int((errors + price * bits).argmin()) for errors, bits in tables]

    def cost(chosen: Sequence[int]) -> int:
        return sum(menu[i].bits for menu, i in zip(menus, chosen, strict=True))

    low, high = 0.0, 1.0
    while cost(at(high)) > limit:
        high *= 10
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) > limit else (low, middle)
    chosen = at(high)
    while True:
        left, best = limit - cost(chosen), (0.0, 0, 0)
        for m, menu in enumerate(menus):
            now = menu[chosen[m]]
            for i, option in enumerate(menu):
                more, gain = option.bits - now.bits, now.error - option.error
                if gain > 0 and more <= left and gain / max(more, 1) > best[0]:
                    best = (gain / max(more, 1), m, i)
        if best[0] == 0.0:
            return [menu[i] for menu, i in zip(menus, chosen, strict=True)]
        chosen[best[1]] = best[2]
