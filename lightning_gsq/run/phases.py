"""The phases of a run in their order, each with its perplexity; then the saved model and the summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.run import tensorboard
from lightning_gsq.run.block_files import OUTER, ROUNDED, Blocks
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.blocks import train_blocks
from lightning_gsq.run.end_to_end import run_end_to_end
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.outer_weights import outer_kind, quantize_outer, read_outer
from lightning_gsq.run.perplexity import Measure
from lightning_gsq.run.report import PERPLEXITY_NAMES, about_text
from lightning_gsq.run.run import Run
from lightning_gsq.run.saving import save_model
from lightning_gsq.run.standard_errors import with_error
from lightning_gsq.run.stored_blocks import StoredBlocks
from lightning_gsq.run.substitution import Substitution
from lightning_gsq.run.summary import make_summary
from lightning_gsq.run.warm_start import warm_start
from lightning_gsq.system.digests import data_digest
from lightning_gsq.system.memory import release
from lightning_gsq.training import EndToEndOptions, ModelQuantization

KINDS_OF_PERPLEXITY = {
    # names of perplexities, in the order of the phases, and the files that the model's weights come from
    "full_precision": None,
    "outer": ROUNDED,
    "warm_start": "warm_start",
    "blocks": "block",
    "end_to_end": "end_to_end",
}


@dataclass(frozen=True)
class Result:
    """The quantized model as far as it is.

    Args:
        kind: Whose it is: that of the ``warm_start``, of each ``block`` or of ``end_to_end``.
        tensors: Quantized weights of each planned block, read when they are asked for.
        outer: Quantized weights outside of the blocks, by name in the model.
        dense: Other parameters that trained, by name in the model.
        end_to_end: Report of the end-to-end phase; None where it did not run.
    """

    kind: str
    tensors: Sequence[Blocks]
    outer: Blocks
    dense: dict[str, Tensor]
    end_to_end: dict[str, Any] | None = None


@dataclass(frozen=True)
class Perplexities:
    """Measures perplexities once each, keeps them in the run folder, logs and prints them.

    Each is kept with the digest of what it was measured of, so that none outlives its weights or its text.

    Args:
        run: The run.
        measure: Measures the model with other weights in it.
        about: What they are measured on.
    """

    run: Run
    measure: Measure
    about: Mapping[str, Any]

    def of(self, kind: str | None) -> str:
        """Digest of what a perplexity depends on; ``kind`` is None for the full-precision model."""
        weights = None if kind is None else digest_of(self.run, kind)
        return self.run.ranks.agree(
            data_digest([weights, self.run.folder.recipe, self.run.recipe["fingerprints"]["evaluation"]])
        )

    def known(self, name: str, kind: str | None) -> float | None:
        """The perplexity of that name, if it was measured of the files that are there."""
        return self.run.folder.perplexity(name, self.of(kind))

    def all(self) -> dict[str, float]:
        """Every perplexity that was measured of the files that are there, in the order of the phases."""
        values = {name: self.known(name, kind) for name, kind in KINDS_OF_PERPLEXITY.items()}
        return {name: value for name, value in values.items() if value is not None}

    def errors(self) -> dict[str, float]:
        """The standard errors of those that have one."""
        values = {n: self.run.folder.perplexity_error(n, self.of(kind)) for n, kind in KINDS_OF_PERPLEXITY.items()}
        return {name: value for name, value in values.items() if value is not None}

    def note(
        self,
        name: str,
        kind: str | None,
        tensors: Sequence[Blocks] | None = None,
        dense: Mapping[str, Tensor] | None = None,
        outer: Blocks | None = None,
    ) -> None:
        """The perplexity of that name, measured unless it is known.

        Args:
            name: Its name.
            kind: Whose files the weights come from; None for the full-precision model.
            tensors: The quantized weights of each planned block; None leaves the blocks as they are.
            dense: Other parameters that trained.
            outer: Quantized weights outside of the blocks.
        """
        folder, of = self.run.folder, self.of(kind)
        value = folder.perplexity(name, of)
        if value is None:
            began = time.perf_counter()
            # What is reported of the quantized model is what its files give: nothing more precise.
            rounded = kind is not None
            measured = self.measure(
                Substitution(self.run.model, self.run.plan, tensors, outer or {}, dense or {}, rounded)
            )
            value = measured.value
            folder.note_perplexity(name, of, value, measured.error)
            folder.add_seconds("evaluation", time.perf_counter() - began)
            for logger in self.run.trainer.loggers:
                logger.log_metrics({f"perplexity/{name}": value}, step=0)
                logger.save()
        action = "of the full-precision model" if kind is None else PERPLEXITY_NAMES[name]
        figure = with_error(value, folder.perplexity_error(name, of), 2)
        self.run.say(f"perplexity {action}: {figure}  ({about_text(self.about)})")


def outer_phase(run: Run, perplexities: Perplexities) -> Blocks:
    """Embedding and head quantized where that is asked for, and what it costs by itself; returns them."""
    began = time.perf_counter()
    outer = quantize_outer(run)
    if not outer:
        return {}
    if perplexities.known("outer", ROUNDED) is None:
        run.folder.add_seconds("outer", time.perf_counter() - began)
    run.ranks.wait()
    perplexities.note("outer", ROUNDED, outer=outer)
    return outer


def warm_start_phase(run: Run, perplexities: Perplexities, outer: Blocks) -> None:
    """The warm start of the whole model, and what it is worth."""
    began = time.perf_counter()
    if warm_start(run, outer):
        run.folder.add_seconds("warm_start", time.perf_counter() - began)
        run.folder.update_progress(init_seconds=run.watch.take())
    run.ranks.wait()
    perplexities.note("warm_start", "warm_start", StoredBlocks(run.folder, "warm_start", run.plan), outer=outer)


def blocks_phase(run: Run, perplexities: Perplexities, outer: Blocks) -> None:
    """Every block trained."""
    train_blocks(run, outer)
    run.ranks.wait()
    release()
    perplexities.note("blocks", "block", StoredBlocks(run.folder, "block", run.plan), outer=outer)


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
    trained = run_end_to_end(run, list(result.tensors), result.outer, options, settings, progress)
    release()
    if trained.rejected:
        return Result(result.kind, result.tensors, result.outer, {}, trained.report)
    tensors, outer = StoredBlocks(run.folder, "end_to_end", run.plan), read_outer(run, "end_to_end")
    perplexities.note("end_to_end", "end_to_end", tensors, trained.dense, outer)
    return Result("end_to_end", tensors, outer, trained.dense, trained.report)


def save_and_summarize(
    run: Run, result: Result, source: loading.ModelSource, perplexities: Perplexities
) -> dict[str, Any]:
    """Saves the dequantized model, unless it is there, and writes the summary, which it returns."""
    made_from = data_digest([run.folder.recipe, digest_of(run, result.kind)])
    weights = Substitution(run.model, run.plan, result.tensors, result.outer, result.dense)
    with weights.outside():
        if run.ranks.first:
            began = time.perf_counter()
            if save_model(weights, run.folder.model, made_from, source):
                run.folder.add_seconds("saving", time.perf_counter() - began)
        run.folder.update_progress(model=result.kind)
        summary = make_summary(
            run, source, result.kind, result.tensors, result.outer, perplexities.all(), result.end_to_end
        )
        summary["perplexity_error"] = perplexities.errors()
        summary["evaluation"] = dict(perplexities.about)
    earlier = run.folder.summary
    earlier_entries = {"exports": earlier.get("exports", {})}
    if earlier.get("zero_shot", {}).get("made_from") == made_from:
        earlier_entries["zero_shot"] = earlier["zero_shot"]
    run.folder.write_summary({**summary, **earlier_entries})
    tensorboard.log_experts(run.trainer.loggers, summary.get("experts", {}))
    figures = {f"perplexity_{name}": value for name, value in summary["perplexity"].items()}
    tensorboard.log_result(
        run.trainer.loggers, run.recipe, {**figures, "bits_per_weight": summary["bits_per_weight"]["total"]}
    )
    return summary


def digest_of(run: Run, kind: str) -> str:
    """A digest of the weights that the files of a phase give the model: of its blocks, and of those outside of them."""
    outer = run.folder.digest(outer_kind(kind), [OUTER]) if run.model.outer.expected(run.model.network) else None
    blocks = None if kind == ROUNDED else run.folder.digest(kind, [plan.index for plan in run.plan])
    return data_digest([blocks, outer])


def kind_before_end_to_end(model: ModelQuantization, plan: list[BlockPlan], folder: RunFolder) -> str:
    """Whose result comes before the end-to-end phase: that of the blocks, or else of the warm start.

    Raises:
        ConfigurationError: there is none, because both phases were left out and never run.
    """
    indices = [block.index for block in plan]
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
