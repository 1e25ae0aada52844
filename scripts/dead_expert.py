"""What becomes of experts that calibration hardly reaches: their error, and what the model loses by it.

A small model of experts is trained on two kinds of text, prose and numbers. Calibration text is prose with a few lines
of numbers, evaluation text is half numbers. Experts that saw fewer calibration tokens than they have columns, in the
run without any option, are *rare*. Each line is the mean over seeds of calibration and noise.

    python scripts/dead_expert.py --folder runs/dead-expert

``block alone`` accepts the experts of a block together, as before they were accepted one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lightning_gsq.cli import main as command
from lightning_gsq.run import acceptance

MORE = {"moe_min_tokens_per_expert": "128", "moe_max_extra_sequences": "512"}
VARIANTS: dict[str, dict[str, str]] = {
    "block alone": {},
    "one by one": {},
    "one by one, 128 tokens each": MORE,
    "one by one, all experts": {"moe_calibrate_all_experts": "true"},
}
LENGTH, EXPERTS, COLUMNS, LAYERS = 64, 16, 64, 2
WORDS = (
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
)


def prose(lines: int, rng: random.Random) -> list[str]:
    """Lines of words."""
    return [" ".join(rng.choices(WORDS, range(len(WORDS), 0, -1), k=12)) + "." for _ in range(lines)]


def numbers(lines: int, rng: random.Random) -> list[str]:
    """Lines of sums, which are right."""
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(lines)]
    return [" ".join(f"{a}+{b}={a + b};" for a, b in [pair, pair[::-1], pair, pair]) for pair in pairs]


def write_text(file: Path, words: int, sums: int, seed: int) -> Path:
    """A text of so many lines of each kind, mixed."""
    rng = random.Random(seed)
    lines = prose(words, rng) + numbers(sums, rng)
    rng.shuffle(lines)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def trained_model(folder: Path, steps: int) -> Path:
    """A small model of experts that knows both kinds of text."""
    from tests.support.tiny import byte_tokenizer

    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=COLUMNS,
        intermediate_size=128,
        moe_intermediate_size=COLUMNS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
    )
    config._experts_implementation = "eager"
    model, tokenizer = AutoModelForCausalLM.from_config(config), byte_tokenizer()
    text = write_text(folder.with_suffix(".txt"), 3000, 3000, seed=1).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (24,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"training the model, step {step}: loss {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def accepting(one_by_one: bool) -> Iterator[None]:
    """Experts accepted one by one, or with their block alone."""
    before = acceptance.find_experts
    if not one_by_one:
        acceptance.find_experts = lambda *_: []  # type: ignore[assignment]
    try:
        yield
    finally:
        acceptance.find_experts = before


def quantized(model: Path, name: str, seed: int, options: argparse.Namespace) -> Path:
    """The run folder of a variant."""
    root: Path = options.folder
    run = root / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    source = '{{class_path: TextFile, init_args: {{path: "{}"}}}}'
    calibration, evaluation = (source.format(root / f"{part}.txt") for part in ("calibration", "evaluation"))
    settings = {
        "seed_everything": seed,
        "trainer.default_root_dir": run,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "data.source": calibration,
        "data.seed": seed,
        "data.sequence_length": LENGTH,
        "data.num_sequences": options.sequences,
        "data.num_validation_sequences": 32,
        "data.batch_size": 4,
        "evaluation.source": evaluation,
        "evaluation.sequence_length": 128,
        "evaluation.num_windows": 64,
        "model.scheme": "{bits: 2, group_size: 32}",
        "model.embedding": "null",
        "model.phases": "[init, blocks]",
        "model.hessian_sequences": 16,
        "model.gumbel.backend": "eager",
        "model.compile_blocks": "false",
        **{f"model.{option}": value for option, value in VARIANTS[name].items()},
    }
    arguments = [part for option, value in settings.items() for part in (f"--{option}", str(value))]
    output = io.StringIO()
    with accepting(name != "block alone"), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = command(["fit", str(model), *arguments])
    if code:
        raise SystemExit(output.getvalue())
    return run


@torch.no_grad()
def measured(original: Any, model: Any, ids_NT: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean KL(original | model) in nats a token; squared error of each expert's output over its energy, and its tokens.

    Experts (``layers experts``) are given what they get in the original.
    """
    calls: list[tuple[Any, ...]] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: calls.append(args))
        for layer in original.model.layers
    ]
    wanted = original(ids_NT, use_cache=False).logits.log_softmax(-1)
    for hook in hooks:
        hook.remove()
    found = model(ids_NT, use_cache=False).logits.log_softmax(-1)
    divergence = float((wanted.exp() * (wanted - found)).sum(-1)[:, :-1].mean())
    errors, tokens = torch.full((LAYERS, EXPERTS), float("nan")), torch.zeros(LAYERS, EXPERTS)
    for layer, (x_ND, chosen_NK, _) in enumerate(calls):
        for expert in range(EXPERTS):
            own_ND = x_ND[(chosen_NK == expert).any(-1)]
            tokens[layer, expert] = len(own_ND)
            call = (own_ND, torch.full((len(own_ND), 1), expert), torch.ones(len(own_ND), 1))
            exact, other = (m.model.layers[layer].mlp.experts(*call) for m in (original, model))
            errors[layer, expert] = (exact - other).square().sum() / exact.square().sum()
    return divergence, errors, tokens


def main() -> None:
    """Trains the model, quantizes it in each way, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything goes")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the model")
    parser.add_argument("--sequences", type=int, default=96, help="calibration sequences that train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = trained_model(options.folder / "model", options.steps)
    write_text(options.folder / "calibration.txt", 4000, 80, seed=2)
    text = write_text(options.folder / "evaluation.txt", 600, 600, seed=3).read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text)["input_ids"])[: 64 * 128].view(64, 128)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        rare: torch.Tensor | None = None
        for name in VARIANTS:
            run = quantized(model, name, seed, options)
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            other = AutoModelForCausalLM.from_pretrained(
                run / "model", dtype=torch.float32, experts_implementation="eager"
            ).eval()
            divergence, errors, tokens = measured(original, other, ids)
            if rare is None:  # of the first variant; "block alone" counts no tokens
                plain = quantized(model, "one by one", seed, options)
                counted = json.loads((plain / "summary.json").read_text(encoding="utf-8"))["experts"]
                rare = torch.tensor([own["tokens"] for own in counted.values()]) < COLUMNS
                print(
                    f"seed {seed}: {int(rare.sum())} of {rare.numel()} experts are rare; they have "
                    f"{float(tokens[rare].sum() / tokens.sum()):.1%} of the evaluation's tokens",
                    flush=True,
                )
            reached = tokens > 0
            kept = sum(len(own.get("kept_start", ())) for own in summary.get("experts", {}).values())
            rows.setdefault(name, []).append(
                {
                    "rare": float(errors[rare & reached].mean()),
                    "worst": float(errors[rare & reached].max()),
                    "others": float(errors[~rare & reached].mean()),
                    "divergence": divergence,
                    "perplexity": summary["perplexity"]["blocks"],
                    "kept": kept,
                }
            )
    full = summary["perplexity"]["full_precision"]
    print(f"\nperplexity of the original: {full:.3f}\n")
    print(
        "| experts accepted | error of rare experts | the worst of them | of the others | went back | KL | perplexity |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, found in rows.items():
        mean = {key: statistics.mean(row[key] for row in found) for key in found[0]}
        print(
            f"| {name} | {mean['rare']:.4f} | {mean['worst']:.4f} | {mean['others']:.4f} | {mean['kept']:.1f} | "
            f"{mean['divergence']:.4f} | {mean['perplexity']:.3f} |"
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
