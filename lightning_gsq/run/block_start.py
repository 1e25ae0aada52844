"""The warm start of a block's weights: each by itself, or following the full-precision model.

A start that follows takes the weights in stages (:mod:`lightning_gsq.run.following`). Experts see the tokens that a
router sends them, which are others in either model: they come last, each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import Matrix
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.calibration import Sent
from lightning_gsq.run.following import Entering, Following
from lightning_gsq.run.matrices import Watched, choose_salient, watch_inputs_of
from lightning_gsq.run.run import Run
from lightning_gsq.saliency import Choice
from lightning_gsq.weights.quantized import QuantizedWeight

S = TypeVar("S")
Begin = Callable[[LinearSite, Matrix, Choice | None], S]
"""Makes the start of a weight from its matrix and its salient part."""


def start_block(
    run: Run,
    plan: BlockPlan,
    block: nn.Module,
    entering: Entering,
    begin: Begin[S],
    as_weight: Callable[[S], QuantizedWeight],
    *,
    says: bool,
) -> tuple[dict[str, S], Sent]:
    """Starts every weight of a block.

    Args:
        run: The run.
        plan: The block's weights and their schemes, as this process has them.
        block: The block on the device; it is left as it was.
        entering: What enters it.
        begin: Starts one weight.
        as_weight: The weight that a start stands for.
        says: Tell the user of matrices that few tokens reached.

    Returns:
        The starts by name, and the tokens that routers send to each expert.
    """

    def watched(part: BlockPlan) -> Watched:
        return watch_inputs_of(run, part, block, entering.quantized, entering.spare, entering.arguments, says=says)

    damping = run.model.start.warm_start.following
    following = None if entering.full is None or damping is None else Following(run, plan, block, entering, damping)
    stages = [] if following is None else following.stages
    everything = watched(plan) if not stages or any(scheme.mixed for scheme in plan.weights.values()) else None
    # A budget is spent on all weights of a block at once.
    choices = {} if everything is None else choose_salient(run, everything.matrices)
    made, dense = dict[str, S](), dict[str, Tensor]()
    for stage in stages:
        assert following is not None
        for site, matrix in following.matrices(stage, dense, says=says):
            with run.watch("warm_start"):
                made[site.name] = begin(site, matrix, choices.get(site.name))
                weight = as_weight(made[site.name]).dequantize()
            dense[site.name] = site.from_matrix(weight.to(block.get_parameter(site.name))).contiguous()
    rest = _without(plan, made)
    if rest.weights and (everything is None or stages):
        with _installed(block, dense):
            everything = watched(rest)
    for site in rest.weights:
        assert everything is not None
        with run.watch("warm_start"):
            made[site.name] = begin(site, everything.matrices[site.name], choices.get(site.name))
    return {site.name: made[site.name] for site in plan.weights}, Sent() if everything is None else everything.experts


def _without(plan: BlockPlan, names: Collection[str]) -> BlockPlan:
    return replace(plan, weights={site: scheme for site, scheme in plan.weights.items() if site.name not in names})


@contextmanager
def _installed(block: nn.Module, dense: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context, the block has these weights."""
    parameters = {name: block.get_parameter(name) for name in dense}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = dense[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
