"""The first phase: the warm start of the whole model, every block on the activations of the blocks before it."""

from __future__ import annotations

from lightning_gsq.run.folder import Blocks
from lightning_gsq.run.forward_passes import embedded, hidden_store, propagate, working_copy
from lightning_gsq.run.matrices import choose_salient, hessian_sequences, matrices_of, to_cpu
from lightning_gsq.run.run import Run
from lightning_gsq.run.substitution import install, outer_installed
from lightning_gsq.saliency.choose import settled_tensor


def warm_start(run: Run, outer: Blocks) -> list[Blocks]:
    """Starts every planned block, or reads what an earlier start left.

    Args:
        run: The run.
        outer: Quantized weights outside of the blocks, whose activations the first block gets.

    Returns:
        The quantized weights of each planned block. The model is left as it was.
    """
    if run.ranks.agree(run.folder.has_blocks("warm_start", [plan.index for plan in run.plan])):
        return [run.folder.read_block("warm_start", plan.index, plan.expected) for plan in run.plan]
    settings, dtype = run.model.start, run.model.storage.scale_dtype
    count = hessian_sequences(run) if settings.warm_start.needs_hessian else 0
    results = []
    with hidden_store((count, run.data.sequence_length, run.width), run.activations, streams=1) as store:
        with outer_installed(run.model.network, outer):
            stream = embedded(run.model.network, run.train_ids_NT[:count], store)
        for index in range(run.last_block + 1):
            block, plan = working_copy(run, index), run.plan_of.get(index)
            if plan is not None:
                matrices = matrices_of(run, plan, block, stream)
                choices = choose_salient(run, matrices)
                with run.watch("warm_start"):
                    tensors = {
                        name: to_cpu(settled_tensor(matrix, choices.get(name), settings.warm_start, dtype))
                        for name, matrix in matrices.items()
                    }
                run.folder.write_block("warm_start", index, tensors)
                results.append(tensors)
                install(block, plan, tensors)
            propagate(run, block, index, stream, stream)
    return results
