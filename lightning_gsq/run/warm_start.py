"""The first phase: the warm start of the whole model, every block on the activations of the blocks before it."""

from __future__ import annotations

import contextlib

from torch import nn

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import Matrix
from lightning_gsq.run.block_files import Blocks
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.block_start import start_block
from lightning_gsq.run.calibration import hessian_sequences, spare_stream
from lightning_gsq.run.finished import Finished
from lightning_gsq.run.following import Entering
from lightning_gsq.run.forward_passes import embedded, hidden_store, propagate, working_copy
from lightning_gsq.run.matrices import as_stored
from lightning_gsq.run.run import Run
from lightning_gsq.run.substitution import install, outer_installed
from lightning_gsq.saliency import Choice
from lightning_gsq.saliency.choose import settled_tensor
from lightning_gsq.system.bar import bar
from lightning_gsq.weights.quantized import QuantizedWeight


def warm_start(run: Run, outer: Blocks) -> bool:
    """Starts every planned block, but for those whose files an earlier start left.

    Args:
        run: The run.
        outer: Quantized weights outside of the blocks, whose activations the first block gets.

    Returns:
        Whether any was made now. Each is in its file; the model is left as it was.
    """
    finished = Finished(run, "warm_start")
    if finished.complete:
        run.say(f"warm start: finished already (0 of {len(run.plan)} blocks to do)")
        return False
    count, follows = hessian_sequences(run) if run.model.start.watches_inputs else 0, run.model.follows
    ids_NT = run.train_ids_NT[:count]
    with contextlib.ExitStack() as at_hand:
        shape = (count, run.data.sequence_length, run.width)
        store = at_hand.enter_context(hidden_store(shape, run.activations, streams=1 + follows))
        with outer_installed(run.model.network, outer):
            stream = embedded(run.model.network, ids_NT, store)
            spare = at_hand.enter_context(spare_stream(run))
        entering = Entering(stream, embedded(run.model.network, ids_NT, store) if follows else None, spare)
        move = at_hand.enter_context(bar("warm start", run.last_block + 1, run.ranks.first))
        for index in range(run.last_block + 1):
            block, plan = working_copy(run, index), run.plan_of.get(index)
            tensors = None if plan is None else finished.take(plan)
            if plan is not None and tensors is None:
                tensors = _start(run, plan, block, entering, finished)
            further = index < run.last_block
            if entering.full is not None and further:
                propagate(run, block, index, entering.full, entering.full)
            if plan is not None and tensors is not None:
                install(block, run.own(plan), tensors)
            for other in filter(None, (stream, spare) if further else ()):
                propagate(run, block, index, other, other)
            move()
    if run.exchange is not None:  # this process has made some of the experts; the files hold all
        run.ranks.wait()
    return True


def _start(run: Run, plan: BlockPlan, block: nn.Module, entering: Entering, finished: Finished) -> Blocks:
    """Starts a block and writes its file; returns what this process has of it."""

    def begin(site: LinearSite, matrix: Matrix, choice: Choice | None) -> QuantizedWeight:
        tensor = settled_tensor(matrix, choice, run.model.start.warm_start, run.model.storage.scale_dtype)
        return as_stored(tensor, matrix.w_OI, matrix.name)

    says = "blocks" not in run.model.phases
    tensors, sent = start_block(run, run.own(plan), block, entering, begin, lambda tensor: tensor, says=says)
    experts = {place: {"tokens": tokens} for place, tokens in sent.items()}
    finished.add(plan, tensors, {"experts": experts} if experts else None)
    return tensors
