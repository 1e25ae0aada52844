"""The second phase: blocks one after another, resumable at each.

With ``F`` the full-precision stream and ``Q`` the quantized one, hidden states of all sequences at the current depth:

F begins with the full-precision embedding, Q with the quantized one where that is quantized; then, block by block,

1. target = block(F) (``stream``) or block(Q) (``local``), see :mod:`lightning_gsq.training.target`
2. codes, scales = fit of the block, Q -> target, unless its file is there
3. Q <- quantized block(Q), F <- block(F)

Sequences for experts that few tokens reach go along in a stream like Q; nothing trains on them.
"""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch

from lightning_gsq.run.block_files import Blocks
from lightning_gsq.run.block_fit import fit_block
from lightning_gsq.run.calibration import spare_stream
from lightning_gsq.run.finished import Finished, Lap
from lightning_gsq.run.forward_passes import embedded, hidden_store, propagate, working_copy
from lightning_gsq.run.hidden_states import Stream
from lightning_gsq.run.run import Run
from lightning_gsq.run.substitution import install, outer_installed


def train_blocks(run: Run, outer: Blocks) -> None:
    """Trains every planned block that has no file yet. The model is left as it was.

    Args:
        run: The run.
        outer: Quantized weights outside of the blocks, with which the quantized stream begins.
    """
    finished = Finished(run, "block")
    if finished.complete:
        run.say(f"blocks: finished already (0 of {len(run.plan)} to do)")
        return
    _say_what_is_there(run, finished)
    ids_NT = torch.cat([run.train_ids_NT, run.validation_ids_NT])
    target = run.model.block.target
    with contextlib.ExitStack() as at_hand:
        store = at_hand.enter_context(hidden_store((*ids_NT.shape, run.width), run.activations, target.streams))
        lap = Lap(run)
        with outer_installed(run.model.network, outer):
            quantized = embedded(run.model.network, ids_NT, store)
            spare = at_hand.enter_context(spare_stream(run))
        full, wanted = quantized, Stream(ids_NT, store.new(), store)
        if target.follows_original:
            full = embedded(run.model.network, ids_NT, store)
        for index in range(run.last_block + 1):
            block, plan = working_copy(run, index), run.plan_of.get(index)
            tensors = None if plan is None else finished.take(plan)
            missing = plan is not None and tensors is None
            if missing or target.follows_original:
                propagate(run, block, index, full, wanted)
            if plan is not None:
                own = run.own(plan)
                if tensors is None:
                    tensors, measures = fit_block(run, own, block, quantized, full, wanted, spare)
                    # A Trainer and its module refer to each other: without this, the logits and optimizer
                    # states of many blocks pile up before Python looks for such cycles by itself.
                    gc.collect()
                    finished.add(plan, tensors, {**lap.take(), **measures, "made_by": made_by(run)})
                install(block, own, tensors)
            if index < run.last_block:
                for stream in filter(None, (quantized, spare)):
                    propagate(run, block, index, stream, stream)
            if target.follows_original:
                full, wanted = wanted, full
            if not missing:
                lap.take()  # the way through blocks that are finished is no part of the next one's time


def made_by(run: Run) -> dict[str, Any]:
    """The processes that share the sequences: they decide how large a step is and what noise each sees."""
    strategy = type(run.trainer.strategy).__name__
    made = {"processes": run.ranks.world, "nodes": run.trainer.num_nodes, "strategy": strategy}
    return made if run.exchange is None else {**made, "expert_parallel": True}


def _say_what_is_there(run: Run, finished: Finished) -> None:
    if not finished.headers:
        return
    run.say(f"Resuming after {len(finished.headers)} finished of {len(run.plan)} blocks")
    now = made_by(run)
    others = [h.measures["made_by"] for h in finished.headers.values() if h.measures.get("made_by", now) != now]
    if others:
        run.say(
            f"Of these, {len(others)} were trained by {_processes(others[0])}, this start has {_processes(now)}: a "
            "step of the coming blocks has another number of sequences and other noise. The summary says which block "
            "had what"
        )


def _processes(made: dict[str, Any]) -> str:
    spread = ", experts spread" if made.get("expert_parallel") else ""
    return f"{made.get('processes')} process(es) on {made.get('nodes')} node(s), {made.get('strategy')}{spread}"
