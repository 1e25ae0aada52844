"""The importance matrix that a run leaves for ``llama-quantize --imatrix``: ``imatrix.gguf`` in its folder.

``--model.save_imatrix true`` writes the mean squares of the inputs of every weight that the run quantizes, in the
full-precision model, over the first ``hessian_sequences`` sequences. What warm starts weigh errors with by themselves
is another thing: the moments in the quantized model, whose blocks before have their errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.imatrix import ImportanceMatrix, InputSquares, write_imatrix
from lightning_gsq.quantizers.statistics import InputSquareSums
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.calibration import collect, hessian_sequences
from lightning_gsq.run.experts import of_all_processes
from lightning_gsq.run.forward_passes import (
    embedded,
    hidden_store,
    propagate,
    working_copy,
)
from lightning_gsq.run.importance import names_of
from lightning_gsq.run.run import Run
from lightning_gsq.system.digests import data_digest
from lightning_gsq.system.files import hidden_name
from lightning_gsq.system.fingerprint import file_digest
from lightning_gsq.training import ModelQuantization

FILE = "imatrix.gguf"


def check_names(model: ModelQuantization, plan: Sequence[BlockPlan]) -> None:
    """Verifies, where an importance matrix is to be written, that every weight has a name in it.

    Raises:
        ConfigurationError: one has none.
    """
    if not model.start.save_imatrix:
        return
    try:
        names = names_of(model)
        for block in plan:
            for site in block.weights:
                names.of(f"{block.name}.{site.name}")
    except ConfigurationError as error:
        raise ConfigurationError(f"model.save_imatrix: {error}") from None


def save_imatrix(run: Run) -> None:
    """Writes ``imatrix.gguf`` where that is asked for, unless an earlier start left it; one pass through the model."""
    if not run.model.start.save_imatrix:
        return
    file = run.folder.root / FILE
    made_from = data_digest([run.folder.recipe, run.recipe["fingerprints"]])
    written = run.folder.progress.get("imatrix", {})
    whole = written.get("of") == made_from and file.is_file() and file_digest(file) == written.get("file")
    if run.ranks.agree(whole):
        return
    names = names_of(run.model)
    entries: dict[str, InputSquares] = {}
    for weight, squares in _squares(run).items():
        entries |= dict.fromkeys(names.of(weight), squares)
    if not run.ranks.first:
        return
    count = hessian_sequences(run) * run.ranks.world
    matrix = ImportanceMatrix(entries, (_text(run.recipe["settings"]),), count, run.data.sequence_length)
    partial = hidden_name(file)
    write_imatrix(partial, matrix)
    partial.replace(file)
    run.folder.update_progress(imatrix={"of": made_from, "file": file_digest(file)})
    run.say(f"importance matrix of {len(entries)} weights: {file}")


@torch.no_grad()
def _squares(run: Run) -> dict[str, InputSquares]:
    """Sums over the inputs of every weight to quantize, in the full-precision model."""
    count = hessian_sequences(run)
    entries: dict[str, InputSquares] = {}
    with hidden_store((count, run.data.sequence_length, run.width), run.activations, streams=1) as store:
        stream = embedded(run.model.network, run.train_ids_NT[:count], store)
        for index in range(run.last_block + 1):
            block, plan = working_copy(run, index), run.plan_of.get(index)
            if plan is not None:
                own = run.own(plan)
                sums = InputSquareSums(list(own.weights), run.device)
                collect(run, sums, plan.index, block, stream)
                for site in own.weights:
                    parts = (of_all_processes(run, own, site.name, part) for part in sums.of(site))
                    entries[f"{plan.name}.{site.name}"] = InputSquares(*parts)
            if index < run.last_block:
                propagate(run, block, index, stream, stream)
    return entries


def _text(settings: Mapping[str, Any]) -> str:
    """A name for the calibration text."""
    source = settings.get("data", {}).get("source") or {}
    path = (source.get("init_args") or {}).get("path")
    return Path(path).name if isinstance(path, str) else str(source.get("class_path", "")).rpartition(".")[2]
