"""A block's weights as they should be for what enters them, stage by stage (:mod:`lightning_gsq.quantizers.following`).

The weights come in stages, as the block uses them: queries, keys and values, then what projects attention's result,
then gate and up, then down. Each stage sees what the stages before it became. What the full-precision block shows is
recorded once, in one pass over the full-precision stream, and kept while there is room for it; the quantized block runs
over the quantized stream for each stage, and ends where the stage's last product was seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_gsq.models.chain import run_block
from lightning_gsq.models.expert_parallel import in_step
from lightning_gsq.models.experts import all_take
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.recording import Recording, record
from lightning_gsq.quantizers import Matrix
from lightning_gsq.quantizers.following import PairedStatistics
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.calibration import hessian_sequences
from lightning_gsq.run.end_loss import weights_of
from lightning_gsq.run.forward_passes import arguments_of, fetch, sequences_at_once
from lightning_gsq.run.hidden_states import Stream
from lightning_gsq.run.matrices import rarely_reached
from lightning_gsq.run.run import Run
from lightning_gsq.system.slices import slices


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


@dataclass
class Stage:
    """Weights that read the same tensor.

    Args:
        sites: They.
        seen: What a run of one sequence shows of them.
    """

    sites: list[LinearSite] = field(default_factory=list)
    seen: Recording = field(default_factory=Recording)


def stages_of(seen: Recording, sites: Iterable[LinearSite]) -> list[Stage]:
    """The weights that read the same tensor together, in the order of their first products.

    Args:
        seen: A run of the block that watched them.
        sites: The weights.
    """
    known = {site.name: site for site in sites}
    stages: dict[object, Stage] = {}
    for name, inputs in seen.inputs.items():
        key = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in inputs)
        stages.setdefault(key, Stage()).sites.append(known[name])
    for stage in stages.values():
        stage.seen = seen.of([site.name for site in stage.sites])
    return list(stages.values())


class Following:
    """The weights of a block that can follow, in stages.

    Args:
        run: The run.
        plan: The block's weights and their schemes, as this process has them.
        block: The block on the device, with its own weights.
        entering: What enters it, in both models.
        damping: As of :meth:`~lightning_gsq.quantizers.following.PairedStatistics.wanted`.
    """

    def __init__(self, run: Run, plan: BlockPlan, block: nn.Module, entering: Entering, damping: float) -> None:
        assert entering.full is not None
        self.run, self.plan, self.block, self.damping = run, plan, block, damping
        self.original = _Passes(run, plan, block, entering.full)
        self.quantized = _Passes(run, plan, block, entering.quantized, entering.arguments)
        watched_NTD = entering.quantized.hidden_NTD[: hessian_sequences(run)]
        self.parts = list(slices(len(watched_NTD), sequences_at_once(watched_NTD.shape[1])))
        sites = all_take(block, plan.weights)
        self.seen = self.quantized.record(slice(1), [site.name for site in sites])
        self.stages = stages_of(self.seen, sites)
        # Processes that exchange tokens make the same passes in every stage, however many sequences each has.
        within = self.seen.bytes * len(watched_NTD) <= run.activations.limit
        self.keeps = within and run.exchange is None
        self._kept: dict[int, Recording] = {}

    def matrices(self, stage: Stage, dense: dict[str, Tensor], *, says: bool) -> Iterator[tuple[LinearSite, Matrix]]:
        """A stage's weights as they should be for what enters them, with its second moments.

        Args:
            stage: One of :attr:`stages`.
            dense: What the weights of the stages before have become, by name.
            says: Tell the user of matrices that few tokens reached.
        """
        run, plan, names = self.run, self.plan, [site.name for site in stage.sites]
        statistics, weights = PairedStatistics(stage.sites, run.device, stage.seen.sums), weights_of(run, plan)
        with run.watch("statistics"), in_step(self.block, 2 * len(self.parts)):
            for number, part in enumerate(self.parts):
                own = {} if weights is None else {name: w_NT[part].flatten() for name, w_NT in weights.items()}
                quantized = self.quantized.record(part, names, stage.seen, dense)
                statistics.add(self._original(number, stage), quantized, own)
        if run.ranks.world > 1:
            statistics.reduce(run.ranks.sum)
        alone = replace(plan, weights={site: plan.weights[site] for site in stage.sites}, held={})
        line = rarely_reached(statistics.inputs, alone)
        if says and line is not None:
            run.say(line)
        for site in stage.sites:
            w_OI = site.to_matrix(self.block.get_parameter(site.name)).detach().float()
            wanted_OI, name = statistics.wanted(site, w_OI, self.damping), f"{plan.name}.{site.name}"
            yield site, Matrix(wanted_OI, statistics.inputs.hessians(site), plan.weights[site], name)

    def _original(self, number: int, stage: Stage) -> Recording:
        """What the full-precision block shows of a stage's weights, for some of the sequences."""
        names = [site.name for site in stage.sites]
        if not self.keeps:
            return self.original.record(self.parts[number], names, stage.seen)
        if number not in self._kept:
            shown = self.original.record(self.parts[number], list(self.seen.inputs), self.seen)
            self._kept[number] = shown.to(torch.device("cpu"))
        return self._kept[number].of(names).to(self.run.device)


class _Passes:
    """Passes of a stream through a block, some sequences at a time.

    Args:
        run: The run.
        plan: The block's weights.
        block: The block.
        stream: What enters it.
        arguments: What it is called with for each sequence, if that is known already.
    """

    def __init__(
        self, run: Run, plan: BlockPlan, block: nn.Module, stream: Stream, arguments: Sequence[Tensor] | None = None
    ) -> None:
        self.run, self.block, self.stream = run, block, stream
        self.call = run.calls[plan.index].to(run.device)
        if arguments is None:
            arguments = arguments_of(run.model.network, run.forms, self.call, plan.index, stream)
        self.arguments = arguments

    def record(
        self,
        part: slice,
        names: Collection[str],
        until: Recording | None = None,
        dense: dict[str, Tensor] | None = None,
    ) -> Recording:
        """What some weights see of some sequences.

        Args:
            part: The sequences.
            names: The weights.
            until: As of :func:`~lightning_gsq.models.recording.record`.
            dense: Weights in place of the block's own, by name.
        """
        bound = self.call.bind([tensor[part] for tensor in self.arguments], torch.float32)
        hidden_BTD = fetch(self.run, self.stream.hidden_NTD[part])
        if self.run.exchange is not None:  # processes exchange tokens in whole passes
            until = None
        with torch.no_grad(), self.run.precision():
            return record(self.block, lambda: run_block(self.block, hidden_BTD, bound, dense or None), names, until)
