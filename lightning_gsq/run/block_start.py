"""The warm start of a block's weights: each by itself, or following the full-precision model.

A start that follows (:mod:`lightning_gsq.quantizers.following`) takes the weights in stages, as the block uses them:
queries, keys and values, then what projects attention's result, then gate and up, then down. Each stage sees what the
stages before it became. It takes two passes, the full-precision block over the full-precision stream and the block as
far as it is quantized over the quantized stream; both end where the stage's last product was seen. Experts see the
tokens that a router sends them, which are others in either model: they come last, each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_gsq.models.chain import run_block
from lightning_gsq.models.expert_parallel import in_step
from lightning_gsq.models.experts import all_take
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.recording import Recording, record, together
from lightning_gsq.quantizers import Matrix
from lightning_gsq.quantizers.following import PairedStatistics
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.calibration import Sent, hessian_sequences
from lightning_gsq.run.end_loss import weights_of
from lightning_gsq.run.forward_passes import arguments_of, fetch, passes_of, sequences_at_once
from lightning_gsq.run.hidden_states import Stream
from lightning_gsq.run.matrices import Watched, choose_salient, rarely_reached, watch_inputs_of
from lightning_gsq.run.run import Run
from lightning_gsq.saliency import Choice
from lightning_gsq.system.slices import slices
from lightning_gsq.weights.quantized import QuantizedWeight

S = TypeVar("S")
Begin = Callable[[LinearSite, Matrix, Choice | None], S]
"""Makes the start of a weight from its matrix and its salient part."""


@dataclass(frozen=True)
class Entering:
    """What enters a block.

    Args:
        quantized: In the quantized model; its first sequences are what the start sees.
        full: The same sequences in the full-precision model; None where the start does not follow it.
        spare: In the quantized model, more sequences for experts that few tokens reach; None where there are none.
        arguments: What the block is called with for each sequence in the quantized model, if that is known already.
    """

    quantized: Stream
    full: Stream | None = None
    spare: Stream | None = None
    arguments: Sequence[Tensor] | None = None


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

    stages = [] if entering.full is None else _stages(run, plan, block, entering)
    everything = watched(plan) if not stages or any(scheme.mixed for scheme in plan.weights.values()) else None
    # A budget is spent on all weights of a block at once.
    choices = {} if everything is None else choose_salient(run, everything.matrices)
    made, dense = dict[str, S](), dict[str, Tensor]()
    for sites in stages:
        for site, matrix in _following(run, plan, block, entering, sites, dense, says=says):
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


def _stages(run: Run, plan: BlockPlan, block: nn.Module, entering: Entering) -> list[dict[LinearSite, Recording]]:
    """The weights that can follow, those that read the same tensor together, in the order of their first products.

    Each with what was seen of it in a run of one sequence.
    """
    plain = {site.name: site for site in all_take(block, plan.weights)}
    seen = _Passes(run, plan, block, entering.quantized, entering.arguments).record(slice(1), plain)
    stages: dict[object, dict[LinearSite, Recording]] = {}
    for name, inputs in seen.inputs.items():
        key = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in inputs)
        own = Recording({name: inputs}, {name: seen.sums[name]} if name in seen.sums else {})
        stages.setdefault(key, {})[plain[name]] = own
    return list(stages.values())


def _following(
    run: Run,
    plan: BlockPlan,
    block: nn.Module,
    entering: Entering,
    stage: Mapping[LinearSite, Recording],
    dense: Mapping[str, Tensor],
    *,
    says: bool,
) -> Iterator[tuple[LinearSite, Matrix]]:
    """A stage's weights as they should be for what enters them, with its second moments.

    Args:
        run: The run.
        plan: The block's weights.
        block: The block.
        entering: What enters it.
        stage: The stage's weights, and what a run shows of them.
        dense: What the weights of the stages before have become.
        says: Tell the user of matrices that few tokens reached.
    """
    statistics, damping = PairedStatistics(stage, run.device), run.model.start.warm_start.following
    assert entering.full is not None and damping is not None
    original = _Passes(run, plan, block, entering.full)
    quantized = _Passes(run, plan, block, entering.quantized, entering.arguments, dense)
    names, until = {site.name for site in stage}, together(stage.values())
    watched, weights = entering.quantized.hidden_NTD[: hessian_sequences(run)], weights_of(run, plan)
    with run.watch("statistics"), in_step(block, 2 * passes_of(watched)):
        for part in slices(len(watched), sequences_at_once(watched.shape[1])):
            own = {} if weights is None else {name: w_NT[part].flatten() for name, w_NT in weights.items()}
            statistics.add(original.record(part, names, until), quantized.record(part, names, until), own)
    if run.ranks.world > 1:
        statistics.reduce(run.ranks.sum)
    line = rarely_reached(statistics.inputs, replace(plan, weights={s: plan.weights[s] for s in stage}, held={}))
    if says and line is not None:
        run.say(line)
    for site in stage:
        w_OI = site.to_matrix(block.get_parameter(site.name)).detach().float()
        wanted_OI, name = statistics.wanted(site, w_OI, damping), f"{plan.name}.{site.name}"
        yield site, Matrix(wanted_OI, statistics.inputs.hessians(site), plan.weights[site], name)


class _Passes:
    """Passes of a stream through a block, some sequences at a time.

    Args:
        run: The run.
        plan: The block's weights.
        block: The block.
        stream: What enters it.
        arguments: What it is called with for each sequence, if that is known already.
        dense: Weights in place of its own, by name.
    """

    def __init__(
        self,
        run: Run,
        plan: BlockPlan,
        block: nn.Module,
        stream: Stream,
        arguments: Sequence[Tensor] | None = None,
        dense: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.run, self.block, self.stream = run, block, stream
        self.call = run.calls[plan.index].to(run.device)
        if arguments is None:
            arguments = arguments_of(run.model.network, run.forms, self.call, plan.index, stream)
        self.arguments, self.dense = arguments, dict(dense or {}) or None

    def record(self, part: slice, names: Collection[str], until: Recording | None = None) -> Recording:
        """What some weights see of some sequences; ``until`` as of :func:`~lightning_gsq.models.recording.record`."""
        bound = self.call.bind([tensor[part] for tensor in self.arguments], torch.float32)
        hidden_BTD = fetch(self.run, self.stream.hidden_NTD[part])
        if self.run.exchange is not None:  # processes exchange tokens in whole passes
            until = None
        with torch.no_grad(), self.run.precision():
            return record(self.block, lambda: run_block(self.block, hidden_BTD, bound, self.dense), names, until)
