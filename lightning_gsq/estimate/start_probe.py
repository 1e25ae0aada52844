"""How long the warm start of a block takes: watching what enters its weights, and rounding one matrix of each shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.timing import once
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import run_block
from lightning_gsq.models.experts import all_take
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.recording import Recording, record
from lightning_gsq.quantizers import FromFile, InputStatistics
from lightning_gsq.quantizers.following import PairedStatistics, nearest
from lightning_gsq.run.following import stages_of
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme

COLUMNS = 4096
"""A matrix of more is tried with so many: what its columns take among each other grows with the cube."""
WEIGHTS = 2**21
"""A matrix of more is tried with so many rows, and with half of them."""


def watching(
    model: ModelQuantization,
    block: nn.Module,
    weights: Weights,
    hidden_BTD: Tensor,
    call: BlockCall,
    precision: AbstractContextManager[object],
) -> Callable[[int], None] | None:
    """What sums up the inputs of a block's weights over some sequences, passes included; None where nothing has to.

    Args:
        model: The settings.
        block: The block.
        weights: Its weights.
        hidden_BTD: The sequences, as many as pass together in a run.
        call: What the block is called with beside it.
        precision: In which its passes run; can be entered again and again.
    """
    if not model.start.watches_inputs:
        return None
    following = all_take(block, weights) if model.follows else []

    def run() -> Tensor:
        return run_block(block, hidden_BTD, call)

    with torch.no_grad(), precision:
        stages = stages_of(record(block, run, [site.name for site in following]), following) if following else []
    # A budget is spent on all weights at once, after one more look.
    apart = [site for site, scheme in weights.items() if site not in following or scheme.mixed]

    def watch(_: int) -> None:
        with torch.no_grad(), precision:
            full = record(block, run, [site.name for site in following]) if stages else Recording()
            for stage in stages:
                names = [site.name for site in stage.sites]
                statistics = PairedStatistics(stage.sites, hidden_BTD.device, stage.seen.sums)
                statistics.add(full.of(names), record(block, run, names, stage.seen))
            if apart:
                with InputStatistics(apart, hidden_BTD.device).watching(block):
                    run()

    return watch


def rounding(model: ModelQuantization, weights: Weights, device: torch.device) -> float:
    """Seconds of the start of all weights, inputs known; none for codes that a file has."""
    if isinstance(model.start.warm_start.rule, FromFile):
        return 0.0
    counts = Counter[tuple[LinearSite, QuantScheme]]()  # of one matrix each
    for site, scheme in weights.items():
        one = LinearSite("", min(site.experts, 1), site.out_features, site.in_features, transposed=False)
        counts[one, scheme] += max(site.experts, 1)
    smallest = min(counts, key=lambda key: key[0].out_features * key[0].in_features)
    _matrix(model, *smallest, device)  # compiles, allocates, and fills caches
    return sum(count * _matrix(model, site, scheme, device) for (site, scheme), count in counts.items())


def _matrix(model: ModelQuantization, site: LinearSite, scheme: QuantScheme, device: torch.device) -> float:
    """Seconds of one matrix."""
    columns = min(site.in_features, COLUMNS)
    rows = min(site.out_features, max(1, WEIGHTS // columns))
    wider = site.in_features / columns
    whole = _seconds(model, site, scheme, (rows, columns), device)
    if rows == site.out_features and wider == 1:
        return whole
    half = _seconds(model, site, scheme, (rows // 2, columns), device)
    a_row = max(0.0, whole - half) / (rows - rows // 2)
    apart = max(0.0, whole - rows * a_row)
    return wider**3 * apart + wider**2 * site.out_features * a_row


def _seconds(
    model: ModelQuantization, site: LinearSite, scheme: QuantScheme, shape: tuple[int, int], device: torch.device
) -> float:
    """Seconds of a matrix of so many rows and columns."""
    start = model.start.warm_start
    damping = start.following if model.follows and not site.experts else None
    w_OI, x_NI = (torch.randn(count, shape[1], device=device) for count in (shape[0], 2 * shape[1]))
    hessian_II = x_NI.T @ x_NI / len(x_NI) if start.rule.needs_hessian or damping is not None else None

    def action(_: int) -> None:
        wanted_OI = w_OI
        if damping is not None and hessian_II is not None:
            wanted_OI = nearest(w_OI, w_OI @ hessian_II, hessian_II, damping)
        start.rule(wanted_OI, hessian_II, scheme)

    return once(action, device)
