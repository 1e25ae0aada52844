"""What ``fit`` does, from checked settings to the summary."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console

from lightning_gsq.commands.tables import print_summary
from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.estimate import refuse_early
from lightning_gsq.estimate.limits import device_bytes
from lightning_gsq.export import FinishedRun, PlannedRun, format_of
from lightning_gsq.export.engine import bring_up_to_date
from lightning_gsq.export.preflight import refuse_exports
from lightning_gsq.models import loading
from lightning_gsq.run import tensorboard as board
from lightning_gsq.run.block_plan import BlockPlan, make_plan
from lightning_gsq.run.blocks import BlockwiseRun
from lightning_gsq.run.end_to_end import EndToEndResult, check_end_to_end, run_end_to_end
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.perplexity import make_measure
from lightning_gsq.run.recipe import make_recipe
from lightning_gsq.run.substitution import as_stored, installed
from lightning_gsq.run.summary import make_summary
from lightning_gsq.system.console import make_console
from lightning_gsq.system.memory import release
from lightning_gsq.system.processes import Ranks, check_shares
from lightning_gsq.training import EndToEndOptions, ModelQuantization

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def fit(
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
    activations: ActivationOptions,
    end_to_end: EndToEndOptions,
    make_trainer: Callable[..., Trainer],
    make_evaluation_trainer: Callable[[], Trainer],
    settings: dict[str, Any],
    seed: int,
    console: Console,
    formats: Sequence[str] = (),
) -> dict[str, Any]:
    """Quantizes a model into a run folder, or goes on where an earlier start of the same run stopped.

    Args:
        model: The model, not loaded yet, and its settings.
        data: Calibration text.
        evaluation: Text for perplexity.
        activations: How hidden states are kept.
        end_to_end: The end-to-end phase.
        make_trainer: Makes a Trainer with the user's settings, some of them replaced where arguments name them.
        make_evaluation_trainer: Makes a Trainer that only evaluates.
        settings: All resolved settings, for the recipe.
        seed: Seed of everything random.
        console: Where to print.
        formats: Formats to export the finished run to.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ConfigurationError: something asked for cannot be done; raised before any long work.
    """
    exports = [format_of(name) for name in dict.fromkeys(formats)]
    source = loading.resolve(model.pretrained, model.revision, model.trust_remote_code)
    limit = loading.max_length(loading.load_config(source))
    trainer = make_trainer()
    data.run_folder = Path(trainer.default_root_dir) / "calibration"
    data.check(limit)
    evaluation.check(limit)
    _check_trainer(trainer)
    folder = RunFolder(trainer.default_root_dir, trainer.global_rank)
    if trainer.global_rank:
        console = make_console(quiet=True)
    model.load(source)
    if "end_to_end" in model.phases:
        check_end_to_end(model, end_to_end, settings["end_to_end"], folder, trainer)
    folder.check_room(_bytes_to_write(model))
    evaluation.tokenize(model.tokenizer)
    plan = make_plan(model)
    model.warm_start.check({f"{own.name}.{name}": what for own in plan for name, what in own.expected.items()})
    planned = PlannedRun(model, plan, settings["model"])
    refuse_exports(exports, planned, folder.root / "export", reserved=_bytes_to_write(model))
    data.tokenize(model.tokenizer, model.network)
    recipe = make_recipe(settings, seed, model, data, evaluation)
    folder.open_recipe(recipe)
    kind = _last_kind(model, plan, folder)
    board.log_recipe(trainer.loggers, recipe)

    shared = {"data__num_sequences": data.train_ids_NT, "data__num_validation_sequences": data.validation_ids_NT}
    shared["evaluation__num_windows"] = evaluation.ids_NT
    check_shares(trainer.world_size, **{name: len(ids_NT) for name, ids_NT in shared.items()})
    with Ranks.joined(trainer) as ranks:
        ranks.wait()
        # Before, to refuse without starting other processes; now, because then the first may not have written it yet.
        folder.open_recipe(recipe)
        folder.share_progress(ranks.agree)
        run = BlockwiseRun(model, data, plan, folder, make_trainer, activations, seed, console.print, ranks)
        refuse_early(model, data, activations, run.width)
        room = device_bytes(run.device)
        say = functools.partial(console.print, soft_wrap=True)
        measure = make_measure(model, evaluation, activations, make_evaluation_trainer, room, say, ranks)
        summary = _phases(run, measure, end_to_end, settings, recipe, source, kind, console)
    if folder.rank:
        return summary
    bring_up_to_date(FinishedRun(folder, recipe, summary, model, plan), exports, console)
    return folder.summary


def _phases(
    run: BlockwiseRun,
    measure: Callable[[], float],
    end_to_end: EndToEndOptions,
    settings: dict[str, Any],
    recipe: dict[str, Any],
    source: loading.ModelSource,
    kind: str,
    console: Console,
) -> dict[str, Any]:
    """The phases asked for, one after another, each with its perplexity; the model and the summary."""
    model, data, plan, folder, ranks = run.model, run.data, run.plan, run.folder, run.ranks
    weights = sum(site.rows * site.in_features for own in plan for site in own.weights)
    console.print(
        f"{model.pretrained}: {len(plan)} blocks, {weights:,} weights to quantize ({model.scheme}), "
        f"{data.num_sequences} calibration sequences of {data.sequence_length} tokens, {run.trainer.precision}, "
        f"{run.device.type}" + (f", {ranks.world} processes" if ranks.world > 1 else ""),
        soft_wrap=True,
    )

    def perplexity(name: str, action: str) -> None:
        known = folder.progress.get("perplexity", {})
        if name not in known:
            began = time.perf_counter()
            # What is reported of the quantized model is what its files give: nothing more precise than they are.
            stored = contextlib.nullcontext() if name == "full_precision" else as_stored(model, plan)
            with stored:
                known = {**known, name: measure()}
            folder.update_progress(perplexity=known)
            _add_seconds(folder, "evaluation", began)
            for logger in run.trainer.loggers:
                logger.log_metrics({f"perplexity/{name}": known[name]}, step=0)
                logger.save()
        console.print(f"perplexity {action}: {known[name]:.2f}")

    perplexity("full_precision", "of the full-precision model")
    if "init" in model.phases:
        _init_phase(run, folder, lambda: perplexity("warm_start", "after the warm start"))
    if "blocks" in model.phases:

        def finished(own: BlockPlan, seconds: float, measures: dict[str, float]) -> None:
            blocks = folder.progress.get("blocks", {})
            folder.update_progress(blocks={**blocks, str(own.index): {"seconds": seconds, **measures}})

        run.train_blocks(finished)
        ranks.wait()
        release()
    tensors = [folder.read_block(kind, own.index, own.expected) for own in plan]
    if "blocks" in model.phases:
        with installed(model, plan, tensors):
            perplexity("blocks", "after the blocks")
    result: EndToEndResult | None = None
    if "end_to_end" in model.phases:
        own_settings = settings["end_to_end"]
        release()
        result = run_end_to_end(
            model,
            data,
            plan,
            tensors,
            end_to_end,
            own_settings,
            folder,
            run.make_trainer,
            run.seed,
            console.print,
            ranks,
        )
        release()
        if not result.rejected:
            kind = "end_to_end"
            tensors = [folder.read_block(kind, own.index, own.expected) for own in plan]
            with installed(model, plan, tensors, result.dense):
                perplexity("end_to_end", "after the end-to-end phase")
    with installed(model, plan, tensors, result.dense if result else None):
        if folder.progress.get("model") != kind:
            began = time.perf_counter()
            if ranks.first:
                loading.save_dense(model.network, model.tokenizer, folder.model, model.output_dtype)
            folder.update_progress(model=kind)
            _add_seconds(folder, "saving", began)
        summary = make_summary(model, source, folder, recipe, kind, plan, tensors, result)
    folder.write_summary({**summary, "exports": folder.summary.get("exports", {})})
    figures = {f"perplexity_{name}": value for name, value in summary["perplexity"].items()}
    board.log_result(run.trainer.loggers, recipe, {**figures, "bits_per_weight": summary["bits_per_weight"]["total"]})
    print_summary(console, summary, str(folder.root))
    return summary


def _last_kind(model: ModelQuantization, plan: list[BlockPlan], folder: RunFolder) -> str:
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


def _init_phase(run: BlockwiseRun, folder: RunFolder, perplexity: Callable[[], None]) -> None:
    """The warm start of the whole model, and what it is worth."""
    if "warm_start" in folder.progress.get("perplexity", {}):
        perplexity()
        return
    began = time.perf_counter()
    starts = run.warm_start()
    _add_seconds(folder, "warm_start", began)
    folder.update_progress(init_seconds=run.watch.take())
    with installed(run.model, run.plan, starts):
        perplexity()


def _check_trainer(trainer: Trainer) -> None:
    if trainer.precision not in PRECISIONS:
        raise ConfigurationError(
            f"trainer.precision: logits and scales train in 32 bits, got {trainer.precision}; use one of "
            f"{', '.join(PRECISIONS)}"
        )
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigurationError("trainer.max_epochs: -1 would train the first block for ever; give epochs or steps")


def _bytes_to_write(model: ModelQuantization) -> int:
    """Upper bound of what a run writes: the dense model, two sets of block files, logs."""
    parameters = sum(p.numel() for p in model.network.parameters())
    return int(parameters * (model.output_dtype.itemsize + 2 * 1.2)) + 50_000_000


def _add_seconds(folder: RunFolder, part: str, began: float) -> None:
    seconds = folder.progress.get("seconds", {})
    folder.update_progress(seconds={**seconds, part: seconds.get(part, 0.0) + time.perf_counter() - began})
