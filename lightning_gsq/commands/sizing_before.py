"""The widths of a size before there is a run: the choice itself, or, without weights, what memory is planned with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console

from lightning_gsq.commands.menu import Free, make_menu, mixture_name
from lightning_gsq.commands.sizing import choose, makes_up
from lightning_gsq.commands.tables import print_choice
from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.estimate import assigned, make_skeleton
from lightning_gsq.export import format_of
from lightning_gsq.models import loading
from lightning_gsq.models.computed_weights import for_a_while
from lightning_gsq.run.block_plan import BlockPlan, make_plan
from lightning_gsq.run.claim import claimed
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.recipe import make_recipe
from lightning_gsq.training import ModelQuantization
from lightning_gsq.widths.choice import FILE


def choose_before(
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
    activations: ActivationOptions,
    trainer: Trainer,
    settings: dict[str, Any],
    seed: int,
    formats: Sequence[str],
    console: Console,
) -> Free:
    """Makes the choice of a run before the run, for :func:`~lightning_gsq.commands.plan.plan`.

    The run folder gets what the choice was made by and the choice; a run in it goes on from there. Arguments as of
    :func:`~lightning_gsq.commands.fit.fit`. The model takes the choice and is not loaded afterwards.

    Returns:
        What there was to choose.

    Raises:
        ConfigurationError: as of :func:`~lightning_gsq.commands.sizing.choose` and
            :func:`~lightning_gsq.commands.menu.make_menu`.
    """
    exports = [format_of(name) for name in dict.fromkeys(formats)]
    source = model.address.source()
    say = functools.partial(console.print, soft_wrap=True)
    data.run_folder = Path(trainer.default_root_dir) / "calibration"
    data.check(None)
    evaluation.check(None)
    with claimed(trainer.default_root_dir, 0, source, say) as folder:
        with for_a_while(folder.root) as scratch:
            model.load(source, scratch=scratch)
        menu = make_menu(model, make_plan(model), exports, settings["model"])
        for note in menu.notes:
            say(f"note: {note}")
        evaluation.tokenize(model.tokenizer, model.network)
        data.tokenize(model.tokenizer, model.network)
        recipe = make_recipe(settings, seed, model, data, evaluation)
        device = trainer.strategy.root_device
        choice = choose(menu, folder, recipe, data.train_ids_NT, device, seed, activations.limit, say)
        print_choice(console, choice, menu.parts(choice), makes_up(model))
        say(f"{folder.root / FILE} keeps it; fit with the same options takes it as it is")
    del model.network
    return menu.free


def has_weights(model: ModelQuantization) -> bool:
    """Whether the model is more than a folder with a configuration."""
    source = model.address.source(need_weights=False)
    return bool(source.files) or not Path(source.path).is_dir()


def assume(model: ModelQuantization, settings: dict[str, Any], formats: Sequence[str], console: Console) -> Free:
    """Takes the widest choice that fits for all matrices, where there are no weights to choose by.

    The size is refused as a run refuses it. Arguments and result as of :func:`choose_before`.

    Raises:
        ConfigurationError: as of :func:`~lightning_gsq.commands.menu.make_menu`, or the file needs a tokenizer.
    """
    assert model.size is not None
    exports = [format_of(name) for name in dict.fromkeys(formats)]
    source = model.address.source(need_weights=False)
    if "gguf" in formats and not any(Path(source.path).glob("tokenizer*")):
        raise ConfigurationError(
            f"model.size: a GGUF file holds the tokenizer, and {source.path} has none, so that its bytes are not "
            "known; add the tokenizer's files, or plan with --export native"
        )
    if "gguf" in formats:
        model.tokenizer = loading.load_tokenizer(source)
    skeleton = make_skeleton(source, loading.load_config(source), model.address.dtype)
    model.network = skeleton.model
    blocks = assigned(model, skeleton).items()
    plan = [BlockPlan(index, f"{skeleton.prefix}.{index}", weights) for index, weights in blocks]
    menu = make_menu(model, plan, exports, settings["model"])
    for note in menu.notes:
        console.print(f"note: {note}", soft_wrap=True)
    options, total = menu.widest_for_all()
    model.take(menu.widths(options), mixture_name(model))
    names = ", ".join(dict.fromkeys(menu.widths(options).values()))
    console.print(
        f"note: {source.path} has no weights, so that nothing says which matrix gets what. What follows is for "
        f"{names}, the widest choice that fits for all: {total:,} of {menu.limit:,} bytes",
        soft_wrap=True,
    )
    del model.network
    return menu.free
