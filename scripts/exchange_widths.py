"""A search on the real loss for the widths of a size: pairwise exchanges, kept where the divergence falls.

    python -m lightning_gsq plan --config cli.yaml --probe false --trainer.default_root_dir runs/plan-70 \
        --model.size 70MB --model.choices [w2g64,w3g64,w4g64,w6g64]
    python scripts/exchange_widths.py --plan runs/plan-70 --size 70MB --choices w2g64 w3g64 w4g64 w6g64 \
        --calibration wiki.txt --seconds 900 --output runs/plan-70/exchanged.yaml
    python scripts/compare_sizes.py --plan runs/plan-70 --size 70MB --choices w2g64 w3g64 w4g64 w6g64 \
        --calibration wiki.txt --evaluation wiki.test.raw --folder runs/sizes --phases \
        --rows knapsack --choice exchanged=runs/plan-70/exchanged.yaml

It begins at the choice by predictions. One matrix of the blocks takes a wider choice and another one a narrower, so
that the file still fits; pairs are drawn by chance among those that the predictions say cost at most ``--tolerance`` of
the whole. An exchange is kept where the divergence of the rounded model falls by more than ``--errors`` standard errors
of the difference, token by token, over ``--sequences`` held-out sequences. As many others tell what of it holds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml
from compare_sizes import rounded
from lightning_gsq.data import CalibrationDataModule
from replacing import Predictions, Roundings
from runs import text_of
from size_rows import add_arguments, predicted_costs, widths_of
from torch import Tensor

from lightning_gsq.commands.menu import Menu, offered
from lightning_gsq.export import format_of
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.run.agreement import divergences
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.training import ModelQuantization
from lightning_gsq.widths import Worth
from lightning_gsq.widths.rounding import change_of

Exchange = dict[str, str]
"""New choices of the two matrices, by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--sequences", type=int, default=4, help="of 512 tokens, and as many others at the end")
    parser.add_argument("--errors", type=float, default=2.0)
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="choice.yaml of what was found")
    options = parser.parse_args()
    model = ModelQuantization(options.pretrained, size=options.size, choices=options.choices)
    model.load(model.address.source())
    menu = offered(model, make_plan(model), [format_of("native")], {})
    widths = widths_of("knapsack", menu, options.plan, {}, rounded=True)
    text = text_of(options.calibration)
    data = CalibrationDataModule(text, num_sequences=4, num_validation_sequences=2 * options.sequences)
    data.tokenize(model.tokenizer, model.network)
    original = Predictions(model.network, data.validation_ids_NT)
    other = Predictions(rounded(model, widths, options.calibration, change_of), data.validation_ids_NT)
    search = Search(original, other, options.sequences)
    roundings = Roundings(model.network, data.train_ids_NT)
    first = search.errors(2 * options.sequences)
    tried, kept, began = 0, 0, time.perf_counter()
    exchanges = proposed(
        menu, widths, predicted_costs(menu, options.plan), options.tolerance, random.Random(options.seed)
    )
    for exchange in exchanges:
        if time.perf_counter() - began > options.seconds:
            break
        tried += 1
        gain = search.try_out(exchange, roundings, options.errors)
        if gain is not None:
            kept += 1
            before = {name: widths[name] for name in exchange}
            widths.update(exchange)
            print(f"{tried} tried, {kept} kept: {before} -> {exchange}: {gain:+.5f}", flush=True)
    options.output.write_text(yaml.safe_dump(widths, sort_keys=False))
    last = search.errors(2 * options.sequences)
    count = options.sequences
    for name, part in (("searched", slice(count)), ("other", slice(count, None))):
        print(json.dumps({"text": name, "before": float(first[part].mean()), "after": float(last[part].mean())}))
    print(json.dumps({"tried": tried, "kept": kept, "seconds": time.perf_counter() - began}))


class Search:
    """The rounded model, and how far it is from the original.

    Args:
        original: Predictions of the model in full precision.
        other: Those of the rounded one, whose matrices are exchanged.
        count: How many of the sequences decide.
    """

    def __init__(self, original: Predictions, other: Predictions, count: int) -> None:
        self.wanted = [original.of(n) for n in range(len(original.held_out_NT))]
        self.other, self.count = other, count
        self.errors_NT = self.errors(count)

    def errors(self, count: int, index: int = 0) -> Tensor:
        """Divergence of every token of the first sequences ``N T``; blocks before ``index`` are as at the last look."""
        return torch.stack([divergences(self.other.of(n, index), self.wanted[n]) for n in range(count)])

    def try_out(self, exchange: Exchange, roundings: Roundings, errors: float) -> float | None:
        """Keeps an exchange if the divergence falls.

        Args:
            exchange: The new choices.
            roundings: Rounds the matrices.
            errors: How many standard errors it must fall by.

        Returns:
            By how much the mean changed; None if the model is as it was.
        """
        places = {name: roundings.place(name) for name in exchange}
        parameters = {name: self.other.blocks[index].get_parameter(own) for name, (index, own) in places.items()}
        earlier = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = roundings.of(name, [exchange[name]])[0]
        errors_NT = self.errors(self.count, min(index for index, _ in places.values()))
        difference = errors_NT - self.errors_NT
        mean, error = float(difference.mean()), float(difference.std()) / difference.numel() ** 0.5
        if mean > -errors * error:
            for name, parameter in parameters.items():
                parameter.data = earlier[name]
            return None
        self.errors_NT = errors_NT
        self.other.remember()
        return mean


def proposed(
    menu: Menu, widths: Mapping[str, str], costs: Worth, tolerance: float, random_numbers: random.Random
) -> Iterator[Exchange]:
    """Pairs that fit, without end; ``widths`` are those of the moment, and change between two of them."""
    prefix = find_blocks(menu.model.network)[0]
    sizes = {g.members[0]: menu.sizes(g) for g in menu.groups if not g.pinned and g.name.startswith(f"{prefix}.")}
    if len(sizes) < 2:
        raise SystemExit("fewer than two matrices have a choice")
    while True:
        wider, narrower = random_numbers.sample(list(sizes), 2)
        exchange: Exchange = {}
        for name, sign in ((wider, 1), (narrower, -1)):
            now = sizes[name][widths[name]]
            offered = [choice for choice, size in sizes[name].items() if sign * (size - now) > 0]
            if offered:
                exchange[name] = random_numbers.choice(offered)
        if len(exchange) < 2:
            continue
        rise = sum(costs[name][choice] - costs[name][widths[name]] for name, choice in exchange.items())
        total = sum(costs[name][choice] for name, choice in widths.items())
        if rise > tolerance * total:
            continue
        if menu.file.total(menu.schemes(menu.options({**widths, **exchange}))) <= menu.limit:
            yield exchange


if __name__ == "__main__":
    main()
