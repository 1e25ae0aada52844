"""A size becomes widths: what each choice is worth, what is chosen, and who chooses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_gsq.commands.menu import Menu, mixture_name
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.ends import end_names
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import GPTQ
from lightning_gsq.run.block_plan import BlockPlan, with_schemes
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.progress import read_json
from lightning_gsq.run.recipe_file import known_choice
from lightning_gsq.system.digests import data_digest
from lightning_gsq.system.files import write_atomically
from lightning_gsq.system.waiting import wait_for
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.widths import Choice, Group, Item, Worth, at_the_end, measure_worth, pick, smoothed
from lightning_gsq.widths.picture import draw_widths
from lightning_gsq.widths.size import SLACK
from lightning_gsq.widths.worth import Candidate, samples

WORTH = "worth.json"
TELL_SECONDS = 60.0
"""After so many seconds a line says how far predictions are."""
WAIT_SECONDS, PAUSE_SECONDS = 6 * 3600, 1.0
"""How long other processes wait for the first one's choice, and between two looks."""


def choose(
    menu: Menu,
    folder: RunFolder,
    recipe: Mapping[str, Any],
    ids_NT: Tensor,
    device: torch.device,
    seed: int,
    limit: float,
    say: Callable[[str], None],
) -> Choice:
    """The choice of a run: the one that it has, or a new one, which the model takes.

    The first process makes it; others wait until it stands in the recipe.

    Args:
        menu: What there is to choose.
        folder: The run folder; it gets ``worth.json`` and ``choice.yaml``.
        recipe: The run's recipe without a choice.
        ids_NT: Calibration sequences.
        device: Where to compute.
        seed: Seed of the run.
        limit: Bytes that changes of a block's matrices may take at once.
        say: Prints a line for the user.

    Raises:
        ConfigurationError: the folder belongs to another run, or its ``choice.yaml`` was edited.
    """
    earlier = known_choice(folder, recipe)
    if earlier is None and folder.rank:
        earlier = _waited_for(folder, recipe)
    if earlier is not None:
        choice = Choice.of_plain(earlier)
        _say_of_another_runtime(menu, choice, say)
    else:
        worth = worth_of(menu, folder, recipe, ids_NT, device, seed, limit, say)
        prefix = find_blocks(menu.model.network)[0]
        costs = smoothed(worth, prefix, len(samples(ids_NT)))
        choice = decide(menu, at_the_end(costs, prefix) if makes_up(menu.model) else costs, say)
    if not folder.rank:
        choice.write(folder.root)
    menu.model.take(choice.widths, mixture_name(menu.model))
    return choice


def makes_up(model: ModelQuantization) -> bool:
    """Whether a run's start, which is GPTQ or a kind of it, makes up for what rounding does to the blocks.

    Phases do not count: they may come later, in a folder whose choice has been made.
    """
    return isinstance(model.start.warm_start.rule, GPTQ)


def chosen_plan(menu: Menu, choice: Choice) -> list[BlockPlan]:
    """The plan with the chosen widths."""
    return with_schemes(menu.plan, {name: scheme_of(width) for name, width in choice.widths.items()})


def picture(menu: Menu, choice: Choice) -> Figure:
    """Bits of every matrix over depth, and where the bytes go."""
    parts = {name: (weights, float(size)) for name, (_, weights, size) in menu.parts(choice).items()}
    return draw_widths(parts, choice.num_bytes - sum(size for _, size in parts.values()))


def decide(menu: Menu, worth: Worth, say: Callable[[str], None]) -> Choice:
    """The choice of the least predicted divergence within the size."""
    assert menu.model.size is not None
    items = [
        Item(group.name, menu.sizes(group), {choice: _cost(worth, group, choice) for choice in group.schemes})
        for group in menu.groups
    ]
    least = menu.extreme()
    rest = menu.file.total(menu.schemes(least)) - sum(item.sizes[least[item.name]] for item in items)
    spare, floor = 0, math.ceil((1 - SLACK) * menu.limit)
    while True:
        # A header has a few bytes more or fewer with other choices: what is over is taken off, until nothing is.
        budget = menu.limit - rest - spare
        solution = pick(items, budget, floor - rest - spare) or pick(items, budget)
        if solution is None:
            raise ConfigurationError(
                f"model.size: no choice takes at most {menu.limit:,} bytes, header included; give a few bytes more"
            )
        total = menu.file.total(menu.schemes(solution.options))
        if total <= menu.limit:
            break
        spare += total - menu.limit
    if total < floor:
        say(
            f"note: no choice comes nearer to {menu.limit:,} bytes than {total:,} "
            f"({total / menu.limit:.1%}): the matrices are few, and their widths far apart"
        )
    if solution.gap > 0:
        say(f"note: the choice is within {solution.gap:.2%} of the best one; the search for it was ended there")
    return Choice(
        menu.widths(solution.options),
        menu.model.size.size.text,
        menu.runtime.name,
        total,
        menu.limit,
        solution.cost,
    )


def worth_of(
    menu: Menu,
    folder: RunFolder,
    recipe: Mapping[str, Any],
    ids_NT: Tensor,
    device: torch.device,
    seed: int,
    limit: float,
    say: Callable[[str], None],
) -> Worth:
    """The worth of every choice, from ``worth.json`` where it is that of this model, text and choices."""
    free = menu.free
    ids_NT = samples(ids_NT)
    scale_dtype = menu.model.storage.scale_dtype
    prints, offered = recipe["fingerprints"], {name: sorted(schemes) for name, schemes in free.items()}
    made_from = data_digest(
        [prints["model"], prints["calibration"], list(ids_NT.shape), seed, str(scale_dtype), offered]
    )
    file = folder.root / WORTH
    content = read_json(file) or {}
    if content.get("made_from") == made_from:
        worth: Worth = content["worth"]
        return worth
    say(f"what each of {len(free)} matrices is worth: {len(ids_NT)} sequences of {ids_NT.shape[1]} tokens")
    began = time.perf_counter()
    inside = {
        block.index: [
            Candidate(site, free[f"{block.name}.{site.name}"])
            for site in block.weights
            if f"{block.name}.{site.name}" in free
        ]
        for block in menu.plan
    }
    network = menu.model.network
    shapes = {name: network.get_parameter(name).shape for name in end_names(network) if name in free}
    outside = [
        Candidate(LinearSite(name, 0, rows, columns, False), free[name]) for name, (rows, columns) in shapes.items()
    ]
    told = began

    def left(count: int) -> None:
        nonlocal told
        if count and time.perf_counter() - told > TELL_SECONDS:
            told = time.perf_counter()
            say(f"  {count} blocks left, {told - began:.0f} s so far")

    worth = measure_worth(network, inside, outside, ids_NT, device, scale_dtype, seed, limit, left)
    lost = next((name for name, costs in worth.items() if not all(map(math.isfinite, costs.values()))), None)
    if lost is not None:
        raise ConfigurationError(
            f"model.size: what {lost} is worth is not finite: activations or gradients overflow "
            "(--model.dtype float32), or the model is damaged"
        )
    seconds = time.perf_counter() - began
    content = {"made_from": made_from, "seconds": seconds, "sequences": list(ids_NT.shape), "worth": worth}
    write_atomically(file, json.dumps(content, indent=1).encode())
    folder.add_seconds("worth", seconds)
    return worth


def _cost(worth: Worth, group: Group, choice: str) -> float:
    return 0.0 if group.pinned else math.fsum(worth[name][choice] for name in group.members)


def _waited_for(folder: RunFolder, recipe: Mapping[str, Any]) -> Any:
    """The choice of the first process, once it stands in the recipe."""

    def look() -> Any:
        return known_choice(folder, recipe) if folder.recipe_file.exists() else None

    earlier = wait_for(look, WAIT_SECONDS, PAUSE_SECONDS)
    if earlier is None:
        raise ConfigurationError(f"model.size: the first process made no choice of widths within {WAIT_SECONDS} s")
    return earlier


def _say_of_another_runtime(menu: Menu, choice: Choice, say: Callable[[str], None]) -> None:
    if menu.runtime.name == choice.runtime:
        return
    total = menu.file.total({name: scheme_of(choice.widths[name]) for name in choice.widths})
    say(
        f"note: the widths of this run were chosen for a {choice.runtime} file of {choice.num_bytes:,} bytes; as "
        f"{menu.runtime.name} they take {total:,}"
    )
