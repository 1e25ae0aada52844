"""The phases of a run in their order, each with its perplexity; then the saved model and the summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.run import tensorboard
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.blocks import train_blocks
from lightning_gsq.run.end_to_end import run_end_to_end
from lightning_gsq.run.folder import Blocks, RunFolder
from lightning_gsq.run.outer_weights import quantize_outer, read_outer
from lightning_gsq.run.report import PERPLEXITY_NAMES
from lightning_gsq.run.run import Run
from lightning_gsq.run.substitution import as_stored, installed, outer_installed
from lightning_gsq.run.summary import make_summary
from lightning_gsq.run.warm_start import warm_start
from lightning_gsq.system.memory import release
from lightning_gsq.training import EndToEndOptions, ModelQuantization


@dataclass(frozen=True)
class Result:
    """The quantized model as far as it is.

    Args:
        kind: Whose it is: that of the ``warm_start``, of each ``block`` or of ``end_to_end``.
        tensors: Quantized weights of each planned block.
        outer: Quantized weights outside of the blocks, by name in the model.
        dense: Other parameters that trained, by name in the model.
        end_to_end: Report of the end-to-end phase; None where it did not run.
    """

    kind: str
    tensors: list[Blocks]
    outer: Blocks
    dense: dict[str, Tensor]
    end_to_end: dict[str, Any] | None = None


@dataclass(frozen=True)
class Perplexities:
    """Measures perplexities once each, keeps them in the run folder, logs and prints them.

    Args:
        run: The run.
        measure: Measures the model as it is at the moment.
    """

    run: Run
    measure: Callable[[], float]

    def note(self, name: str) -> None:
        """The perplexity of that name, measured unless it is known."""
        measured = self.run.folder.progress.get("perplexity", {})
        if name not in measured:
            began = time.perf_counter()
            # What is reported of the quantized model is what its files give: nothing more precise than they are.
            original = name == "full_precision"
            with contextlib.nullcontext() if original else as_stored(self.run.model, self.run.plan):
                measured = {**measured, name: self.measure()}
            self.run.folder.update_progress(perplexity=measured)
            add_seconds(self.run.folder, "evaluation", began)
            for logger in self.run.trainer.loggers:
                logger.log_metrics({f"perplexity/{name}": measured[name]}, step=0)
                logger.save()
        action = "of the full-precision model" if name == "full_precision" else PERPLEXITY_NAMES[name]
        self.run.say(f"perplexity {action}: {measured[name]:.2f}")


def outer_phase(run: Run, perplexities: Perplexities) -> Blocks:
    """Embedding and head quantized where that is asked for, and what it costs by itself; returns them."""
    began = time.perf_counter()
    outer = quantize_outer(run)
    if not outer:
        return {}
    if "outer" not in run.folder.progress.get("perplexity", {}):
        add_seconds(run.folder, "outer", began)
    run.ranks.wait()
    with outer_installed(run.model.network, outer):
        perplexities.note("outer")
    return outer


def warm_start_phase(run: Run, perplexities: Perplexities, outer: Blocks) -> None:
    """The warm start of the whole model, and what it is worth."""
    if "warm_start" in run.folder.progress.get("perplexity", {}):
        perplexities.note("warm_start")
        return
    began = time.perf_counter()
    starts = warm_start(run, outer)
    add_seconds(run.folder, "warm_start", began)
    run.folder.update_progress(init_seconds=run.watch.take())
    with installed(run.model, run.plan, starts, outer=outer):
        perplexities.note("warm_start")


def blocks_phase(run: Run, perplexities: Perplexities, outer: Blocks) -> None:
    """Every block trained."""

    def finished(plan: BlockPlan, seconds: float, measures: dict[str, float]) -> None:
        blocks = run.folder.progress.get("blocks", {})
        run.folder.update_progress(blocks={**blocks, str(plan.index): {"seconds": seconds, **measures}})

    train_blocks(run, finished, outer)
    run.ranks.wait()
    release()
    with installed(run.model, run.plan, read_blocks(run, "block"), outer=outer):
        perplexities.note("blocks")


def end_to_end_phase(
    run: Run,
    result: Result,
    perplexities: Perplexities,
    options: EndToEndOptions,
    settings: dict[str, Any],
    progress: Callback | None,
) -> Result:
    """The whole model trained a little more; what came before it where that is better."""
    release()
    trained = run_end_to_end(run, result.tensors, result.outer, options, settings, progress)
    release()
    if trained.rejected:
        return Result(result.kind, result.tensors, result.outer, {}, trained.report)
    tensors, outer = read_blocks(run, "end_to_end"), read_outer(run, "end_to_end")
    with installed(run.model, run.plan, tensors, trained.dense, outer):
        perplexities.note("end_to_end")
    return Result("end_to_end", tensors, outer, trained.dense, trained.report)


def save_and_summarize(run: Run, result: Result, source: loading.ModelSource) -> dict[str, Any]:
    """Saves the dequantized model, unless it is there, and writes the summary, which it returns."""
    with installed(run.model, run.plan, result.tensors, result.dense, result.outer):
        if run.folder.progress.get("model") != result.kind:
            began = time.perf_counter()
            if run.ranks.first:
                dtype = run.model.storage.output_dtype
                loading.save_dense(run.model.network, run.model.tokenizer, run.folder.model, dtype)
            run.folder.update_progress(model=result.kind)
            add_seconds(run.folder, "saving", began)
        summary = make_summary(
            run.model,
            source,
            run.folder,
            run.recipe,
            result.kind,
            run.plan,
            result.tensors,
            result.outer,
            result.end_to_end,
        )
    run.folder.write_summary({**summary, "exports": run.folder.summary.get("exports", {})})
    figures = {f"perplexity_{name}": value for name, value in summary["perplexity"].items()}
    tensorboard.log_result(
        run.trainer.loggers, run.recipe, {**figures, "bits_per_weight": summary["bits_per_weight"]["total"]}
    )
    return summary


def read_blocks(run: Run, kind: str) -> list[Blocks]:
    """Quantized weights of each planned block, from the files of a phase."""
    return [run.folder.read_block(kind, plan.index, plan.expected) for plan in run.plan]


def kind_before_end_to_end(model: ModelQuantization, plan: list[BlockPlan], folder: RunFolder) -> str:
    """Whose result comes before the end-to-end phase: that of the blocks, or else of the warm start.

    Raises:
        ConfigurationError: there is none, because both phases were left out and never run.
    """
    indices = [own.index for own in plan]
    if "blocks" in model.phases:
        return "block"
    if "end_to_end" not in model.phases:
        return "warm_start"
    if folder.has_blocks("block", indices):
        return "block"
    if "init" in model.phases or folder.has_blocks("warm_start", indices):
        return "warm_start"
    raise ConfigurationError(
        f"model.phases: end_to_end goes on from quantized blocks, and {folder.root} has no finished set of them; add "
        "blocks (or init, to start from the warm start)"
    )


def add_seconds(folder: RunFolder, part: str, began: float) -> None:
    """Adds the seconds since ``began`` to a part of the run."""
    seconds = folder.progress.get("seconds", {})
    folder.update_progress(seconds={**seconds, part: seconds.get(part, 0.0) + time.perf_counter() - began})
