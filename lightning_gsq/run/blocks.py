"""The second phase: blocks one after another, resumable at each.

With ``F`` the full-precision stream and ``Q`` the quantized one, hidden states of all sequences at the current depth:

F begins with the full-precision embedding, Q with the quantized one where that is quantized; then, block by block,

1. target = block(F) (``stream``) or block(Q) (``local``), see :mod:`lightning_gsq.training.target`
2. codes, scales = fit of the block, Q -> target, unless its file is there
3. Q <- quantized block(Q), F <- block(F)
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from lightning_gsq.run.block_fit import fit_block
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.folder import Blocks
from lightning_gsq.run.forward_passes import embedded, hidden_store, propagate, working_copy
from lightning_gsq.run.hidden_states import Stream
from lightning_gsq.run.run import Run
from lightning_gsq.run.substitution import install, outer_installed

Finished = Callable[[BlockPlan, float, dict[str, float]], None]
"""What is told of a finished block: its plan, its seconds, its measures."""


def train_blocks(run: Run, finished: Finished, outer: Blocks) -> None:
    """Trains every planned block that has no file yet. The model is left as it was.

    Args:
        run: The run.
        finished: Told of every block.
        outer: Quantized weights outside of the blocks, with which the quantized stream begins.
    """
    done = _finished_blocks(run)
    if len(done) == len(run.plan):
        return
    if done:
        run.say(f"Resuming after {len(done)} finished of {len(run.plan)} blocks")
    ids_NT = torch.cat([run.train_ids_NT, run.validation_ids_NT])
    target = run.model.block.target
    with hidden_store((*ids_NT.shape, run.width), run.activations, target.streams) as store:
        with outer_installed(run.model.network, outer):
            quantized = embedded(run.model.network, ids_NT, store)
        full, wanted = quantized, Stream(ids_NT, store.new(), store)
        if target.follows_original:
            full = embedded(run.model.network, ids_NT, store)
        for index in range(run.last_block + 1):
            began, measures = time.perf_counter(), dict[str, float]()
            run.watch.take()
            block, plan, tensors = working_copy(run, index), run.plan_of.get(index), done.get(index)
            missing = plan is not None and tensors is None
            if missing or target.follows_original:
                propagate(run, block, index, full, wanted)
            if plan is not None:
                if tensors is None:
                    tensors, measures = fit_block(run, plan, block, quantized, full, wanted)
                    # A Trainer and its module refer to each other: without this, the logits and optimizer
                    # states of many blocks pile up before Python looks for such cycles by itself.
                    gc.collect()
                    run.folder.write_block("block", index, tensors)
                install(block, plan, tensors)
            propagate(run, block, index, quantized, quantized)
            if target.follows_original:
                full, wanted = wanted, full
            if plan is not None and missing:
                parts = {f"seconds/{part}": seconds for part, seconds in run.watch.take().items()}
                finished(plan, time.perf_counter() - began, measures | parts)


def _finished_blocks(run: Run) -> dict[int, Blocks]:
    """Blocks on disk, up to the first that is missing."""
    done = {}
    there = [run.folder.has_blocks("block", [plan.index]) for plan in run.plan]
    for plan, exists in zip(run.plan, run.ranks.agree(there), strict=True):
        if not exists:
            break
        done[plan.index] = run.folder.read_block("block", plan.index, plan.expected)
    return done
