"""How fast weights are sampled from their logits, forward and backward, in every form that this machine has.

    python scripts/bench_sampling.py                                 # Llama-3.1-8B's down projection on a GPU
    python scripts/bench_sampling.py --rows 1536 --columns 576       # SmolLM2-135M's up projection
    python scripts/bench_sampling.py --bits 1 2 3 --dtype bfloat16

Medians and the spread; forms take turns within every round, so that a drifting machine affects them alike. "autograd"
is the specification as PyTorch differentiates it, what one would write without this op.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_gsq.ops.gumbel_softmax import gumbel_softmax_weight
from lightning_gsq.ops.gumbel_softmax.reference import gumbel_softmax_weight_reference

LEVELS = {1: (0.0,), 2: (-2.0, -1.0, 0.0, 1.0), 3: (-1.0, 0.0, 1.0)}
"""Candidates by width: a sign, the whole grid, shifts of one around a base code."""


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--rows", type=int, default=4096 if cuda else 1536)
    parser.add_argument("--columns", type=int, default=14336 if cuda else 576)
    parser.add_argument("--group-size", type=int, default=128 if cuda else 64)
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3], choices=sorted(LEVELS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the logits")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    title = (
        f"{options.rows} x {options.columns}, groups of {options.group_size}, {options.dtype} logits, "
        f"{name}, torch {torch.__version__}; ms: median (min-max)"
    )
    table = Table(title=title, title_justify="left")
    for column in ("bits", "form", "forward", "backward", "both, against autograd"):
        table.add_column(column, justify="right")
    rows = []
    for bits in options.bits:
        shape, groups = (options.rows, options.columns), -(-options.columns // options.group_size)
        logits = (0.02 * torch.randn(len(LEVELS[bits]), *shape, device=device)).to(dtype).requires_grad_()
        scales = torch.rand(options.rows, groups, device=device, requires_grad=True)
        base = torch.randint(-3, 3, shape, dtype=torch.int8, device=device) if bits == 3 else None
        upstream = torch.randn(shape, device=device, dtype=dtype)
        settings = {"kappa": 300.0, "tau": 1.0, "seed": 1, "group_length": options.group_size}

        def sample(backend: str, levels: tuple = LEVELS[bits], logits: Tensor = logits, scales: Tensor = scales,
                   base: Tensor | None = base, settings: dict = settings) -> Callable[[], Tensor]:  # fmt: skip
            if backend == "autograd":
                return lambda: gumbel_softmax_weight_reference(logits, scales, levels, base, **settings)
            return lambda: gumbel_softmax_weight(logits, scales, levels, base, backend=backend, **settings)  # type: ignore[arg-type]

        forms = {form: sample(form) for form in ("autograd", "eager", "compile", *(["triton"] if cuda else []))}
        taken: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
        for round_ in range(options.rounds + 2):
            for form, call in forms.items():
                began = clock(device)
                w = call()
                middle = clock(device)
                torch.autograd.grad(w, (logits, scales), upstream)
                if round_ >= 2:
                    taken[form].append((middle - began, clock(device) - middle))
        whole = {form: statistics.median(sum(pair) for pair in pairs) for form, pairs in taken.items()}
        for form, pairs in taken.items():
            parts = [[1e3 * value for value in values] for values in zip(*pairs, strict=True)]
            texts = [f"{statistics.median(part):.3g} ({min(part):.3g}-{max(part):.3g})" for part in parts]
            rows.append([str(bits), form, *texts, f"{whole['autograd'] / whole[form]:.2f}"])
            table.add_row(*rows[-1])
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps({"title": title, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
