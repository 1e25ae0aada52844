"""From a scheme with open ends to one matrix's own: salient ratio, salient weights, groups.

Everything that SAGE-PTQ (arXiv 2606.05429) decides for each matrix before it quantizes happens here, in its order:
saliency score, number of groups, salient ratio; or, with a budget, all of them at once for the matrices of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import Matrix, WarmStart
from lightning_gsq.quantizers.dual_mode import quantize_elements
from lightning_gsq.quantizers.salient_start import MixedStart, mixed_start, mixed_tensor, stack_starts
from lightning_gsq.quantizers.warm_start import quantized, start_of
from lightning_gsq.saliency import scores as saliency
from lightning_gsq.saliency.budget import MAX_RATIO, Menu, Option, column_errors, mixed_bits, options_of, spend
from lightning_gsq.saliency.graph import GraphOptions, graph_group_count
from lightning_gsq.saliency.threshold import adaptive_ratio
from lightning_gsq.weights.quantized import QuantizedWeight
from lightning_gsq.weights.salient_part import SalientPart, column_count
from lightning_gsq.weights.scheme import QuantScheme

SAMPLE_ROWS = 128
"""Rows of a matrix that the search for an element-wise ratio looks at."""
FIRST_RATIO = 0.01
"""Salient ratio at which the groups are counted when the ratio itself is still open."""


@dataclass(frozen=True)
class SettleOptions:
    """How the open ends of a scheme are settled.

    Args:
        price: Relative squared error that one true bit a weight is worth, for the search of the salient ratio.
        max_ratio: Largest salient ratio of that search.
        graph: How groups are counted.
        menu: What a budget may be spent on.

    Raises:
        ConfigurationError: a value out of range.
    """

    price: float = 0.1
    max_ratio: float = MAX_RATIO
    graph: GraphOptions = field(default_factory=GraphOptions)
    menu: Menu = field(default_factory=Menu)

    def __post_init__(self) -> None:
        if not self.price > 0:
            raise ConfigurationError(f"model.saliency.price must be positive, got {self.price}")
        if not 0 < self.max_ratio < 1:
            raise ConfigurationError(f"model.saliency.max_ratio must lie between 0 and 1, got {self.max_ratio}")


@dataclass(frozen=True)
class Choice:
    """What was chosen for one matrix.

    Args:
        scheme: With nothing left open.
        columns_K: The salient columns of the structured layout, rising.
        mask_OI: The salient weights of the element layout.
        figures: ``ratio``, ``groups`` (distinct scales), ``error`` (relative squared error of plain rounding) and
            ``bits`` (true bits a weight).
    """

    scheme: QuantScheme
    columns_K: Tensor | None
    mask_OI: Tensor | None
    figures: dict[str, float]


def settle(matrices: Mapping[str, Matrix], options: SettleOptions) -> dict[str, Choice]:
    """Chooses the salient part of each matrix of a block.

    Args:
        matrices: By name; each with a scheme that has a salient part or a budget.
        options: How.

    Raises:
        ConfigurationError: a budget is too small for any choice.
    """
    choices = {name: _settle_one(matrix, options) for name, matrix in matrices.items() if not matrix.scheme.budget}
    budgeted = {name: matrix for name, matrix in matrices.items() if matrix.scheme.budget}
    if budgeted:
        menus = [options_of(m.w_OI, _moment(m), m.scheme, options.menu) for m in budgeted.values()]
        limit = sum(int(m.w_OI.numel() * (m.scheme.budget or 0)) for m in budgeted.values())
        spent = zip(budgeted.items(), spend(menus, limit), strict=True)
        choices |= {name: _from_option(matrix, option) for (name, matrix), option in spent}
    return {name: choices[name] for name in matrices}


def settled_start(matrix: Matrix, choice: Choice, warm_start: WarmStart) -> MixedStart:
    """The warm start of a matrix in the structured layout."""
    assert choice.columns_K is not None
    return stack_starts(
        [mixed_start(w, hessian, choice.columns_K, choice.scheme, warm_start) for w, hessian in matrix.parts()]
    )


def settled_tensor(
    matrix: Matrix, choice: Choice | None, warm_start: WarmStart, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """A matrix after its warm start alone; ``choice`` is None for a scheme without a salient part."""
    if choice is None:
        return quantized(start_of(matrix, warm_start), matrix.scheme, scale_dtype)
    if choice.mask_OI is not None:
        return quantize_elements(matrix.w_OI, choice.mask_OI, choice.scheme, scale_dtype, _element_moment(matrix))
    both = settled_start(matrix, choice, warm_start)
    rest, salient = (None if s is None else (s.codes_OI, s.scales_OG) for s in (both.rest, both.salient))
    assert rest is not None
    return mixed_tensor(both.columns_K, rest, salient, choice.scheme, scale_dtype)


def _settle_one(matrix: Matrix, options: SettleOptions) -> Choice:
    part = matrix.scheme.salient
    assert part is not None
    return (_element if part.layout == "element" else _structured)(matrix, part, options)


def _structured(matrix: Matrix, part: SalientPart, options: SettleOptions) -> Choice:
    w_OI, scheme = matrix.w_OI, matrix.scheme
    (rows, columns), moment_I = w_OI.shape, _moment(matrix)
    few_I = column_errors(w_OI, moment_I, scheme.plain)
    many_I = column_errors(w_OI, moment_I, scheme.salient_scheme)
    score_I = few_I - many_I if part.score == "error" else _scores(matrix, part).square().sum(0)
    order_I = score_I.argsort(descending=True, stable=True)
    saved_I = torch.cat([few_I.new_zeros(1), (few_I - many_I)[order_I].cumsum(0)])
    energy = float((w_OI.square().sum(0) * moment_I).sum().clamp_min(1e-30))
    groups = part.scale_groups
    if groups == "graph":
        segments = w_OI.abs().split(scheme.group_length(columns), dim=1)
        groups = graph_group_count(torch.cat([s.mean(1) for s in segments]), options.graph).count

    def with_count(count: int) -> QuantScheme:
        settled = dataclasses.replace(part, ratio=count / columns, scale_groups=groups)
        return dataclasses.replace(scheme, salient=settled)

    def cost(ratio: float) -> tuple[float, float]:
        count = column_count(ratio, columns)
        bits = mixed_bits(rows, columns, with_count(count)) / w_OI.numel()
        return float(few_I.sum() - saved_I[count]) / energy, bits

    ratio = part.ratio
    if ratio is None:
        ratio = adaptive_ratio(cost, options.price, high=options.max_ratio).ratio
    count = column_count(ratio, columns)
    error, _ = cost(ratio)
    option = Option(
        with_count(count), order_I[:count].sort().values, error, mixed_bits(rows, columns, with_count(count))
    )
    return _from_option(matrix, option)


def _from_option(matrix: Matrix, option: Option) -> Choice:
    part = option.scheme.salient
    assert part is not None and part.ratio is not None
    trained = matrix.scheme.salient.trained if matrix.scheme.salient is not None else True
    scheme = dataclasses.replace(option.scheme, salient=dataclasses.replace(part, trained=trained))
    rows, columns = matrix.w_OI.shape
    free = rows * scheme.num_groups(columns - len(option.columns_K))
    groups = part.scale_groups if isinstance(part.scale_groups, int) else free
    figures = {
        "ratio": part.ratio,
        "groups": float(groups),
        "error": option.error,
        "bits": option.bits / matrix.w_OI.numel(),
    }
    return Choice(scheme, option.columns_K, None, figures)


def _element(matrix: Matrix, part: SalientPart, options: SettleOptions) -> Choice:
    w_OI, scores_OI, moment_I = matrix.w_OI, _scores(matrix, part), _element_moment(matrix)
    groups = part.scale_groups
    if not isinstance(groups, int):
        rest = w_OI[~saliency.salient_mask(scores_OI, FIRST_RATIO if part.ratio is None else part.ratio)]
        groups = graph_group_count(rest.abs(), options.graph).count

    def with_mask(mask_OI: Tensor) -> QuantScheme:
        settled = dataclasses.replace(part, ratio=int(mask_OI.sum()) / mask_OI.numel(), scale_groups=groups)
        return dataclasses.replace(matrix.scheme, salient=settled)

    def measure(w_OI: Tensor, scores_OI: Tensor, ratio: float) -> tuple[float, float]:
        mask_OI = saliency.salient_mask(scores_OI, ratio)
        tensor = quantize_elements(w_OI, mask_OI, with_mask(mask_OI), torch.float16, moment_I)
        h_I = torch.ones_like(w_OI[0]) if moment_I is None else moment_I
        error = ((w_OI - tensor.dequantize()).square() @ h_I).sum() / (w_OI.square() @ h_I).sum().clamp_min(1e-30)
        return float(error), tensor.ledger().per_weight()["total"]

    ratio = part.ratio
    if ratio is None:
        step = max(1, len(w_OI) // SAMPLE_ROWS)
        some_OI, their_scores_OI = w_OI[::step], scores_OI[::step]
        ratio = adaptive_ratio(
            lambda r: measure(some_OI, their_scores_OI, r), options.price, high=options.max_ratio
        ).ratio
    mask_OI = saliency.salient_mask(scores_OI, ratio)
    scheme, (error, bits) = with_mask(mask_OI), measure(w_OI, scores_OI, ratio)
    assert scheme.salient is not None and scheme.salient.ratio is not None
    figures = {"ratio": scheme.salient.ratio, "groups": float(groups), "error": error, "bits": bits}
    return Choice(scheme, None, mask_OI, figures)


def _scores(matrix: Matrix, part: SalientPart) -> Tensor:
    if part.score == "hessian":
        if matrix.hessians is None:
            raise ConfigurationError(
                f"model.scheme.salient.score hessian: {matrix.name} has no second moments of its inputs, because the "
                "warm start asks for none. Use RTN with weighted true, GPTQ or DualMode, or score magnitude"
            )
        return torch.cat([saliency.hessian_score(w, h) for w, h in matrix.parts() if h is not None])
    return saliency.magnitude_score(matrix.w_OI)


def _moment(matrix: Matrix) -> Tensor:
    """Mean second moment of the inputs, ``I``; ones where none were collected."""
    if matrix.hessians is None:
        return torch.ones_like(matrix.w_OI[0])
    return torch.stack([hessian.diagonal() for hessian in matrix.hessians]).mean(0)


def _element_moment(matrix: Matrix) -> Tensor | None:
    """The published quantizer looks at the weights alone, unless saliency is asked to look at the inputs."""
    part = matrix.scheme.salient
    return _moment(matrix) if part is not None and part.score == "hessian" and matrix.hessians is not None else None
