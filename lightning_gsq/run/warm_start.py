"""The first phase: the warm start of the whole model, every block on the activations of the blocks before it."""

from __future__ import annotations

import contextlib

from lightning_gsq.run.block_files import Blocks
from lightning_gsq.run.calibration import hessian_sequences, spare_stream
from lightning_gsq.run.finished import Finished
from lightning_gsq.run.forward_passes import embedded, hidden_store, propagate, working_copy
from lightning_gsq.run.matrices import as_stored, choose_salient, watch_inputs_of
from lightning_gsq.run.run import Run
from lightning_gsq.run.substitution import install, outer_installed
from lightning_gsq.saliency.choose import settled_tensor
from lightning_gsq.system.bar import bar


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
    settings, dtype = run.model.start, run.model.storage.scale_dtype
    count = hessian_sequences(run) if settings.watches_inputs else 0
    with contextlib.ExitStack() as at_hand:
        shape = (count, run.data.sequence_length, run.width)
        store = at_hand.enter_context(hidden_store(shape, run.activations, streams=1))
        with outer_installed(run.model.network, outer):
            stream = embedded(run.model.network, run.train_ids_NT[:count], store)
            spare = at_hand.enter_context(spare_stream(run))
        move = at_hand.enter_context(bar("warm start", run.last_block + 1, run.ranks.first))
        for index in range(run.last_block + 1):
            block, plan = working_copy(run, index), run.plan_of.get(index)
            if plan is not None:
                tensors, own = finished.take(plan), run.own(plan)
                if tensors is None:
                    says = "blocks" not in run.model.phases
                    watched = watch_inputs_of(run, own, block, stream, spare, says=says)
                    choices = choose_salient(run, watched.matrices)
                    with run.watch("warm_start"):
                        tensors = {
                            name: as_stored(
                                settled_tensor(matrix, choices.get(name), settings.warm_start, dtype),
                                matrix.w_OI,
                                matrix.name,
                            )
                            for name, matrix in watched.matrices.items()
                        }
                    experts = {place: {"tokens": tokens} for place, tokens in watched.experts.items()}
                    finished.add(plan, tensors, {"experts": experts} if experts else None)
                install(block, own, tensors)
            if index < run.last_block:
                for entering in filter(None, (stream, spare)):
                    propagate(run, block, index, entering, entering)
            move()
    if run.exchange is not None:  # this process has made some of the experts; the files hold all
        run.ranks.wait()
    return True
