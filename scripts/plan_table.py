"""What quantizing large models takes, by `plan` from their published configurations: a table for docs/plan.md.

    python scripts/plan_table.py --output docs/plan.md

Every model's matrices at 2 bits in groups of 128, warm start and blocks on 1,024 sequences of 2,048 tokens, perplexity
block by block. The hours are no measurement: products with each token's active weights, and what a step reads and
writes of the weights it trains (logits, gradients, optimizer state, sampled weights), at a given share of a device's
peaks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "<!-- plan -->"
CONFIGS = ROOT / "tests" / "estimate" / "configs"
MODELS = {
    "llama-3.1-70b": "Llama-3.1-70B",
    "qwen3-next-80b": "Qwen3-Next-80B",
    "gpt-oss-120b": "gpt-oss-120B",
    "deepseek-v3": "DeepSeek-V3",
    "kimi-k2.5": "Kimi-K2.5 (its text decoder)",
}
SEQUENCES, TOKENS, DEVICE_GB = 1024, 2048, 80
PEAK, BANDWIDTH, SHARE = 989e12, 3.35e12, 0.3
"""Operations and bytes a second of an H100 (data sheet, bfloat16, dense), and the share of both that is assumed."""
SAMPLED = 2
"""Bytes of a sampled weight: bfloat16."""
STEP_PASSES, STREAM_PASSES = 3, 2
"""A step's forward and backward pass, in forward passes; and those of the two streams."""


def planned(name: str) -> tuple[Any, Any, float]:
    """The plan of a model, its settings' data, and the seconds it took."""

    from lightning.pytorch import Trainer
    from lightning_gsq.data import CalibrationDataModule, PerplexityData, TextFile

    from lightning_gsq.estimate import estimate
    from lightning_gsq.quantizers import GumbelOptions
    from lightning_gsq.run.hidden_states import ActivationOptions
    from lightning_gsq.training import EndToEndOptions, Lion, ModelQuantization
    from lightning_gsq.weights.scheme import QuantScheme

    text = TextFile(str(ROOT / "README.md"))
    data = CalibrationDataModule(text, sequence_length=TOKENS, num_sequences=SEQUENCES, batch_size=1)
    evaluation = PerplexityData(text, sequence_length=TOKENS, num_windows=64, by_block=True)
    model = ModelQuantization(
        str(CONFIGS / name),
        QuantScheme(2, 128),
        phases=["init", "blocks"],
        gumbel=GumbelOptions(logits_dtype="bfloat16"),
        optimizer=lambda groups: Lion(groups, lr=1e-3),
    )
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(accelerator="cpu", precision="bf16-mixed", max_epochs=1, logger=False, barebones=False)
        activations, end_to_end = ActivationOptions(dtype="bfloat16"), EndToEndOptions()
        plan = estimate(model, data, evaluation, activations, end_to_end, trainer, False, 1e15, DEVICE_GB * 1e9)
    return plan, data, time.perf_counter() - began


def active_weights(plan: Any) -> float:
    """Weights that a token is multiplied with, of all blocks."""
    config = plan.skeleton.model.config.get_text_config(decoder=True)
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    return sum(
        site.rows * site.in_features * (chosen / site.experts if site.experts else 1)
        for weights in plan.plan.values()
        for site in weights
    )


def trained_bytes(plan: Any, training: Any) -> float:
    """What the weights of all blocks have beside them while they train, as those of the largest block do."""
    counts = [sum(site.rows * site.in_features for site in weights) for weights in plan.plan.values()]
    of = {name: size for term, size in training.device.items() for name in ("logits", "optimizer") if name in term}
    largest = 2 * of["logits"] + of["optimizer"] + SAMPLED * max(counts)  # gradients are as large as what they are of
    return float(largest) * sum(counts) / max(counts)


def row(name: str) -> str:
    """A line of the table."""
    plan, data, _ = planned(name)
    training = next(phase for phase in plan.phases if phase.name == "blocks: training of a block")
    _, device = training.total(plan.on_host)
    host = max(phase.needed(plan.on_host) for phase in plan.phases)
    disk = sum(plan.run_folder.values()) + plan.streams
    tokens = data.num_sequences * data.sequence_length
    passes = STEP_PASSES + STREAM_PASSES
    products = passes * 2 * active_weights(plan) * tokens / (PEAK * SHARE)
    hours = (products + 2 * plan.steps * trained_bytes(plan, training) / (BANDWIDTH * SHARE)) / 3600
    devices = next((m[1] for line in plan.problems if (m := re.search(r"on each of (\d+) devices", line))), None)
    fits = "one" if device <= DEVICE_GB * 1e9 else f"{devices}, experts spread" if devices else "none"
    bits = sum(ledger.num_bytes for ledger in plan.ledgers.values())
    return (
        f"| {MODELS[name]} | {plan.skeleton.parameters / 1e9:,.1f} | {bits / 1e9:,.1f} GB | {device / 1e9:,.1f} GB | "
        f"{fits} | {host / 1e9:,.0f} GB | {disk / 1e9:,.0f} GB | {math.ceil(hours * 10) / 10:,.1f} |"
    )


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="models, instead of all")
    parser.add_argument("--output", type=Path, help=f"Markdown file for the table, after a line `{MARK}`")
    options = parser.parse_args()
    lines = [
        "| model | parameters, 10⁹ | quantized weights | largest block, in training | "
        f"devices of {DEVICE_GB} GB | host memory | disk | hours, assumed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in options.only:
        began = time.process_time()
        lines.append(row(name))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{lines[-1]}  {time.process_time() - began:.0f} s of processor time, {peak:.2f} GB", flush=True)
    if options.output:
        before = options.output.read_text(encoding="utf-8").partition(MARK)[0]
        options.output.write_text(before + MARK + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
