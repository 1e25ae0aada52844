"""Uniform width, a rule by hand and the chosen widths at equal bytes: divergence and perplexity, one JSON line a row.

    python -m lightning_gsq plan --config cli.yaml --probe false --trainer.default_root_dir runs/plan-70 \
        --model.size 70MB --model.choices [w2g64,w3g64,w4g64,w6g64] --data.source wiki.txt
    python scripts/compare_sizes.py --plan runs/plan-70 --size 70MB --choices w2g64 w3g64 w4g64 w6g64 \
        --calibration wiki.txt --evaluation wiki.test.raw --folder runs/sizes --phases init blocks end_to_end

``--phases`` without a value rounds the model in memory, as the predictions do, and trains nothing: minutes instead of
hours. Otherwise every row is a run of the command line in a folder of its own with the widths as overrides, so that a
stopped comparison goes on where it was. Rows: ``knapsack`` takes the predictions of ``worth.json`` in the folder of the
plan; ``rule`` the same knapsack over a rule by hand in their place (an error costs its squared step, four times as much
in the first and last blocks and in every ``down_proj`` and ``v_proj``); ``uniform`` the width of the most bytes that
fits, for all matrices; ``llama.cpp`` the mix of the most bytes that fits (Q2_K ... Q6_K), of a GGUF file; and
``--choice NAME=FILE`` adds a row for any other choice, such as the ``choice.yaml`` of a plan.

With ``--format gguf`` the rows that are rounded in memory are rounded by llama.cpp's own quantizers, with the mean
square of every input as importance; ``--size Q3_K_M`` then is the size of the file of that mix.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_gsq.data import CalibrationDataModule, PerplexityData
from llama_cpp_mixes import BASES
from runs import add_row, has_row, summary_of, text_of, texts
from size_rows import ROWS, add_arguments, mix_bytes, widths_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_gsq.commands.menu import offered
from lightning_gsq.export import format_of
from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.ends import end_names, find_ends, head_inputs
from lightning_gsq.models.linear_weights import find_linear_sites
from lightning_gsq.quantizers import LlamaCpp
from lightning_gsq.quantizers.warm_start import quantized, stack
from lightning_gsq.run.agreement import divergences
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.widths.rounding import Change, change_of
from lightning_gsq.widths.worth import Candidate, changes_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--fallback", action="store_true")
    parser.add_argument("--format", default="native", choices=["native", "gguf"])
    parser.add_argument("--rows", nargs="*", default=ROWS[:3], choices=ROWS)
    parser.add_argument("--choice", action="append", default=[], metavar="NAME=FILE", help="a row for a choice.yaml")
    parser.add_argument("--phases", nargs="*", default=["init"])
    parser.add_argument("--evaluation")
    parser.add_argument("--windows", type=int, default=24, help="of 1,024 tokens, for perplexity and divergence")
    parser.add_argument("--folder", type=Path, required=True)
    options, further = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    files = {name: Path(file) for name, _, file in (given.partition("=") for given in options.choice)}
    about = {row: {"row": row, "size": options.size, "phases": options.phases} for row in (*options.rows, *files)}
    wanted = [row for row, entries in about.items() if not has_row(options.folder, entries)]
    if not wanted:
        return
    size = "16bpw" if options.size in BASES else options.size
    model = ModelQuantization(options.pretrained, size=size, choices=options.choices, fallback=options.fallback)
    model.load(model.address.source())
    menu = offered(model, make_plan(model), [format_of(options.format)], {})
    if options.size in BASES:
        menu = replace(menu, limit=mix_bytes(options.size, menu))
    for row in wanted:
        began = time.perf_counter()
        widths = widths_of(row, menu, options.plan, files, rounded=not options.phases)
        line: dict[str, Any] = dict(about[row])
        line["bytes"] = menu.file.total({own: scheme_of(width) for own, width in widths.items()})
        folder = options.folder / f"{row}-{options.size}"
        if options.phases:
            line["perplexity"] = trained(widths, folder, options, further)
            other = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        else:
            other = rounded(model, widths, options.calibration, by_llama_cpp if options.format == "gguf" else change_of)
        line |= distance(model, other, options.evaluation, options.windows)
        line["seconds"] = time.perf_counter() - began
        add_row(options.folder, line)


def trained(
    widths: Mapping[str, str], folder: Path, options: argparse.Namespace, further: list[str]
) -> dict[str, float]:
    """Perplexities of a run with these widths, which is made where it is not there."""
    overrides = folder.with_suffix(".yaml")
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
    return dict(summary_of(folder, arguments, name)["perplexity"])


@torch.no_grad()
def rounded(
    model: ModelQuantization, widths: Mapping[str, str], calibration: str | None, change: Change
) -> PreTrainedModel:
    """A copy of the model, each matrix rounded to its width."""
    text = text_of(calibration)
    data = CalibrationDataModule(text, sequence_length=512, num_sequences=4, num_validation_sequences=1)
    data.tokenize(model.tokenizer, model.network)
    other = copy.deepcopy(model.network)
    traces = [trace(model.network, ids_T[None]) for ids_T in data.train_ids_NT]
    moments_D = head_inputs(model.network, data.train_ids_NT).float().flatten(0, -2).square().mean(0)
    prefix, blocks = find_blocks(other)
    for index, block in enumerate(blocks):
        batches = [(own.inputs_BTD[index], own.calls[index]) for own in traces]
        names = {name.removeprefix(f"{prefix}.{index}."): width for name, width in widths.items()}
        sites = find_linear_sites(block, functools.partial(run_block, block, *batches[0]))
        candidates = [Candidate(site, {"own": scheme_of(names[site.name])}) for site in sites if site.name in names]
        changes = changes_of(block, candidates, batches, torch.device("cpu"), torch.float16, change)
        for candidate in candidates:
            site, parameter = candidate.site, block.get_parameter(candidate.site.name)
            parameter.data = site.from_matrix(site.to_matrix(parameter) + changes[site.name][0]).contiguous()
    for name in end_names(other):
        if name in widths:
            parameter = other.get_parameter(name)
            ends = find_ends(other)
            own_D = moments_D if ends.tied or ends.head == name else None
            parameter.data += change(parameter.data, [own_D], scheme_of(widths[name]), torch.float16)
    return other


def by_llama_cpp(
    w_OI: Tensor, importances: Sequence[Tensor | None], scheme: QuantScheme, scale_dtype: torch.dtype
) -> Tensor:
    """What rounding by llama.cpp adds to a matrix; see :func:`~lightning_gsq.widths.rounding.change_of`."""
    rule, parts = LlamaCpp(), []
    for part_OI, own_I in zip(w_OI.chunk(len(importances)), importances, strict=True):
        hessian_II = None if own_I is None else 2 * own_I.diag()
        parts.append(rule(part_OI, hessian_II, scheme))
    return quantized(stack(parts), scheme, scale_dtype).dequantize() - w_OI


@torch.no_grad()
def distance(
    model: ModelQuantization, other: PreTrainedModel, evaluation: str | None, windows: int
) -> dict[str, float]:
    """Divergence from the original, nats a token, and the perplexity of both, over the windows."""
    text = text_of(evaluation, "evaluation")
    data = PerplexityData(text, sequence_length=1024, num_windows=windows)
    data.tokenize(model.tokenizer, model.network)
    sums = {"divergence": 0.0, "original": 0.0, "quantized": 0.0}
    for ids_T in data.ids_NT:
        first, second = (net(ids_T[None], use_cache=False).logits[0].log_softmax(-1) for net in (model.network, other))
        sums["divergence"] += float(divergences(second, first).mean())
        for name, predictions in (("original", first), ("quantized", second)):
            sums[name] -= float(predictions[:-1].gather(1, ids_T[1:, None]).mean())
    means = {name: value / len(data.ids_NT) for name, value in sums.items()}
    return {
        "divergence": means["divergence"],
        "perplexity_original": math.exp(means["original"]),
        "perplexity_quantized": math.exp(means["quantized"]),
    }


if __name__ == "__main__":
    main()
