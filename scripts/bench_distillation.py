"""What the end-to-end phase's loss costs: chunk by chunk from hidden states, and as plain log-softmax over all logits.

    python scripts/bench_distillation.py                          # SmolLM2-135M's head: 49,152 tokens, width 576
    python scripts/bench_distillation.py --precision 32 --device cuda --vocabulary 128256 --width 4096

Every form runs in a process of its own, so that its peak memory is its own; times are processor time on a CPU (so that
neighbours count little) and device time on a GPU, the fastest of a few.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_gsq.ops.distillation import Head, HiddenTarget, TopKTarget, distillation_loss

FORMS = ("plain", "chunked", "top-k")


def plain(hidden_ND: Tensor, head: Head, target: HiddenTarget) -> Tensor:
    """The textbook form: two log-softmax over all logits, differentiated by autograd."""
    log_q_NV = torch.log_softmax(head.logits(hidden_ND).float(), dim=-1)
    with torch.no_grad():
        log_p_NV = torch.log_softmax(target.head.logits(target.hidden_ND).float(), dim=-1)
    return nn.functional.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="batchmean")


def measure(form: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of one loss with its gradient."""
    torch.manual_seed(0)
    device, size = torch.device(arguments.device), (arguments.positions, arguments.width)
    head = Head(torch.randn(arguments.vocabulary, arguments.width, device=device) * arguments.width**-0.5)
    hidden_ND = torch.randn(size, device=device).requires_grad_()
    target = HiddenTarget(hidden_ND.detach() + 0.1 * torch.randn(size, device=device), head)
    labels_N = torch.randint(arguments.vocabulary, size[:1], device=device)
    loss: Callable[[], Tensor] = lambda: distillation_loss(hidden_ND, head, target, labels_N, chunk=arguments.chunk)[0]  # noqa: E731
    if form == "plain":
        loss = lambda: plain(hidden_ND, head, target)  # noqa: E731
    elif form == "top-k":
        parts = [torch.log_softmax(head.logits(part), dim=-1).topk(64) for part in target.hidden_ND.split(128)]
        stored = TopKTarget(*(torch.cat([part[i] for part in parts]) for i in (1, 0)))
        loss = lambda: distillation_loss(hidden_ND, head, stored, labels_N, chunk=arguments.chunk)[0]  # noqa: E731
    half = torch.autocast(device.type, torch.bfloat16) if arguments.precision == "bf16" else nullcontext()
    before, seconds = peak(device), []
    for _ in range(arguments.repeats + 1):
        hidden_ND.grad, began = None, now(device)
        with half:
            value = loss()
        value.backward()
        seconds.append(now(device) - began)
    return {"seconds": min(seconds[1:]), "bytes": peak(device) - before, "loss": value.item()}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--precision", choices=["bf16", "32"], default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--form", choices=FORMS, help="measure one form in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.form:
        print(json.dumps(measure(arguments.form, arguments)))
        return
    table = Table("loss and gradient", "seconds", "memory added", "loss")
    for form in FORMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table.add_row(form, f"{found['seconds']:.2f}", f"{found['bytes'] / 1e6:,.0f} MB", f"{found['loss']:.5f}")
    Console().print(table)


if __name__ == "__main__":
    main()
