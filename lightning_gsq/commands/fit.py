"""What ``fit`` does, from checked settings to the summary."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console

from lightning_gsq.callbacks import EndToEndProgress
from lightning_gsq.commands.menu import make_menu
from lightning_gsq.commands.sizing import choose, chosen_plan, makes_up, picture
from lightning_gsq.commands.tables import print_choice, print_next, print_summary
from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.estimate import refuse_early
from lightning_gsq.estimate.limits import device_bytes
from lightning_gsq.export import FinishedRun, PlannedRun, format_of
from lightning_gsq.export.engine import announce, bring_up_to_date
from lightning_gsq.export.folders import tidy
from lightning_gsq.export.preflight import refuse_exports, suggested_formats
from lightning_gsq.export.registry import all_formats
from lightning_gsq.models import loading
from lightning_gsq.models.computed_weights import FOLDER as COMPUTED
from lightning_gsq.run import tensorboard as board
from lightning_gsq.run.block_plan import BlockPlan, make_plan, not_quantized
from lightning_gsq.run.calibration import check_experts
from lightning_gsq.run.checks import check_layouts, check_scales, check_trainer
from lightning_gsq.run.claim import claimed
from lightning_gsq.run.end_loss import check_end_loss
from lightning_gsq.run.end_to_end import check_end_to_end
from lightning_gsq.run.experts import check_expert_parallel
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.imatrix_file import check_names, save_imatrix
from lightning_gsq.run.importance import Importance, read_importance
from lightning_gsq.run.perplexity import Room, make_measure
from lightning_gsq.run.phases import (
    Perplexities,
    Result,
    blocks_phase,
    end_to_end_phase,
    kind_before_end_to_end,
    outer_phase,
    save_and_summarize,
    warm_start_phase,
)
from lightning_gsq.run.recipe import make_recipe
from lightning_gsq.run.recipe_file import open_recipe
from lightning_gsq.run.report import counted
from lightning_gsq.run.run import Run, make_run
from lightning_gsq.run.saving import check_saving
from lightning_gsq.run.stored_blocks import StoredBlocks
from lightning_gsq.run.trial import try_settings
from lightning_gsq.system.console import make_console
from lightning_gsq.system.memory import host_bytes
from lightning_gsq.system.processes import Ranks, check_shares
from lightning_gsq.system.shards import SHARD_SIZE
from lightning_gsq.training import EndToEndOptions, ModelQuantization


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
    command: str = "",
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
        command: The command line that asked for it, for the recipe; empty where there was none.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ConfigurationError: something asked for cannot be done; raised before any long work.
    """
    exports = [format_of(name) for name in dict.fromkeys(formats)]
    source = model.address.source()
    limit = loading.max_length(loading.load_config(source))
    trainer = make_trainer()
    check_trainer(settings["trainer"], trainer, model.phases)
    data.num_spare_sequences = model.start.spare_sequences(data.num_sequences)
    data.run_folder = Path(trainer.default_root_dir) / "calibration"
    data.check(limit)
    evaluation.check(limit)
    if trainer.global_rank:
        console = make_console(quiet=True)
    say = functools.partial(console.print, soft_wrap=True)
    with claimed(trainer.default_root_dir, trainer.global_rank, source, say) as folder:
        for name in all_formats() if not folder.rank else ():
            tidy(folder.root / "export" / name)
        model.load(source, scratch=folder.root / COMPUTED)
        if "end_to_end" in model.phases:
            check_end_to_end(model, end_to_end, settings["end_to_end"], folder)
        try_settings(model, end_to_end, make_trainer)
        folder.check_room(_bytes_to_write(model))
        if not folder.rank:
            check_saving(model.network, model.tokenizer, folder.root)
        plan = make_plan(model)
        for line in [*not_quantized(model, plan), *filter(None, [model.outer.left(model.network)])]:
            say(line)
        menu = None if model.size is None else make_menu(model, plan, exports, settings["model"])
        for note in () if menu is None else menu.notes:
            say(f"note: {note}")
        plan = plan if menu is None else menu.plan
        check_expert_parallel(model, plan, trainer)
        importance = _check_plan(model, plan, end_to_end)
        if menu is not None:
            _check_plan(model, menu.widest_plan, end_to_end)
        planned, root = PlannedRun(model, plan, settings["model"]), folder.root / "export"
        reserved = _bytes_to_write(model)
        if menu is None:
            announce(exports, planned, root, reserved, console)
        else:
            refuse_exports(exports, planned, root, reserved)
        evaluation.tokenize(model.tokenizer, model.network)
        data.tokenize(model.tokenizer, model.network)
        _check_shares(model, trainer, data, evaluation)
        recipe = make_recipe(settings, seed, model, data, evaluation)
        if menu is not None:
            device = trainer.strategy.root_device
            choice = choose(menu, folder, recipe, data.train_ids_NT, device, seed, activations.limit, say)
            plan = chosen_plan(menu, choice)
            print_choice(console, choice, menu.parts(choice), makes_up(model))
            board.log_figure(trainer.loggers, "widths", picture(menu, choice))
            announce(exports, PlannedRun(model, plan, settings["model"]), root, reserved, console)
            recipe = make_recipe(settings, seed, model, data, evaluation, choice.as_plain())
        if command:
            recipe["command"] = command
        open_recipe(folder, recipe, say)
        kind = kind_before_end_to_end(model, plan, folder)
        board.log_recipe(trainer.loggers, recipe)
        board.log_guide(trainer.loggers, [*model.phases, *["size"] * (menu is not None)])
        with Ranks.joined(trainer) as ranks:
            ranks.wait()
            # Before, to refuse without starting other processes; now, because then the first may not have written it.
            open_recipe(folder, recipe)
            folder.share_progress(ranks.agree)
            run = make_run(model, data, plan, folder, recipe, make_trainer, activations, seed, say, ranks, importance)
            refuse_early(model, data, activations, run.width)
            room = Room(device_bytes(run.device), host_bytes())
            measure = make_measure(model, evaluation, activations, make_evaluation_trainer, room, say, ranks, plan)
            perplexities = Perplexities(run, measure, evaluation.about(str(run.trainer.precision)))
            result = _phases(run, perplexities, kind, end_to_end, settings["end_to_end"])
            summary = save_and_summarize(run, result, source, perplexities)
        if folder.rank:
            return summary
        print_summary(console, summary, str(folder.root))
        finished = FinishedRun(folder, recipe, summary, model, plan)
        bring_up_to_date(finished, exports, console)
        shutil.rmtree(folder.root / COMPUTED, ignore_errors=True)
        further = [name for name in suggested_formats(finished) if format_of(name) not in exports]
        print_next(console, str(folder.root), model.address.pretrained, further)
        return folder.summary


def _phases(
    run: Run, perplexities: Perplexities, kind: str, end_to_end: EndToEndOptions, settings: dict[str, Any]
) -> Result:
    """The phases asked for, one after another."""
    run.say(_what_is_done(run))
    perplexities.note("full_precision", None)
    save_imatrix(run)
    outer = outer_phase(run, perplexities)
    if "init" in run.model.phases:
        warm_start_phase(run, perplexities, outer)
    if "blocks" in run.model.phases:
        blocks_phase(run, perplexities, outer)
    result = Result(kind, StoredBlocks(run.folder, kind, run.plan), outer, {})
    if "end_to_end" in run.model.phases:
        result = end_to_end_phase(run, result, perplexities, end_to_end, settings, EndToEndProgress())
    return result


def _what_is_done(run: Run) -> str:
    weights = sum(site.rows * site.in_features for plan in run.plan for site in plan.weights)
    processes = f", {run.ranks.world} processes" if run.ranks.world > 1 else ""
    return (
        f"{run.model.address.pretrained}: {counted(len(run.plan), 'block')}, {weights:,} weights to quantize "
        f"({run.model.selection}), "
        f"{counted(run.data.num_sequences, 'calibration sequence')} of {run.data.sequence_length} tokens, "
        f"{run.trainer.precision}, {run.device.type}{processes}"
    )


def _check_plan(model: ModelQuantization, plan: list[BlockPlan], end_to_end: EndToEndOptions) -> Importance | None:
    """Verifies that every weight can have its scheme, its scales and its start; returns the importance matrix."""
    model.outer.expected(model.network)
    check_layouts(plan, model.phases, end_to_end.train)
    check_scales(model, plan)
    expected = {f"{block.name}.{name}": what for block in plan for name, what in block.expected.items()}
    model.start.warm_start.check(expected)
    check_names(model, plan)
    check_experts(model, plan)
    check_end_loss(model)
    return read_importance(model, plan)


def _check_shares(
    model: ModelQuantization, trainer: Trainer, data: CalibrationDataModule, evaluation: PerplexityData
) -> None:
    """Verifies that every process gets something to work on."""
    if model.follows or model.start.end_loss_weights:  # others add up what there is
        check_shares(trainer.world_size, model__hessian_sequences=model.start.hessian_sequences)
    check_shares(
        trainer.world_size,
        data__num_sequences=len(data.train_ids_NT),
        data__num_validation_sequences=len(data.validation_ids_NT),
        evaluation__num_windows=len(evaluation.ids_NT),
    )


def _bytes_to_write(model: ModelQuantization) -> int:
    """Upper bound of what a run writes: the dense model, a file of it once more, two sets of block files, logs."""
    parameters = sum(p.numel() for p in model.network.parameters())
    dense = parameters * model.storage.output_dtype.itemsize
    return int(dense + min(dense, SHARD_SIZE) + parameters * 2 * 1.2) + 50_000_000
