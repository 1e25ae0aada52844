"""Peak host memory of a run and of its exports, part by part, on a random model of a size that is asked for.

    OMP_NUM_THREADS=1 python scripts/host_memory.py --host_mb 40     # 24 blocks of width 256 on a machine of 40 MB
    OMP_NUM_THREADS=1 python scripts/host_memory.py --blocks 48 --formats native,gguf --end_to_end
    OMP_NUM_THREADS=1 python scripts/host_memory.py --blocks 8 --experts 32 --fp8 --host_mb 60 --formats native

What counts is said in ``tests/support/host_memory.py``. A thread reads the figure every two milliseconds, and each part
of the work has the most that it saw there, less what the process had after the same work on a model of one block: what
libraries take when they are first used is no part of it.

A block is counted in the dtype of the checkpoint. Without an accelerator the device's memory is the host's, so
that the training of a block is a line of the table too.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_gsq.system.memory
from tests.support.host_memory import GIVEN_BACK, Peaks, large_experts, large_llama, short_run

PARTS = {
    # what is looked at: module, function or method, and what the table calls it
    "fit": (
        ("lightning_gsq.training.model", "ModelQuantization.load", "load"),
        ("lightning_gsq.commands.fit", "make_plan", "look at the blocks"),
        ("lightning_gsq.commands.fit", "make_run", "look at the blocks"),
        ("lightning_gsq.commands.fit", "warm_start_phase", "warm start"),
        ("lightning_gsq.commands.fit", "blocks_phase", "blocks: training"),
        ("lightning_gsq.commands.fit", "end_to_end_phase", "end to end"),
        ("lightning_gsq.run.phases", "Perplexities.note", "perplexity"),
        ("lightning_gsq.commands.fit", "save_and_summarize", "save"),
    ),
    "export": (
        ("lightning_gsq.commands.export", "open_run", "export: open"),
        ("lightning_gsq.export.engine", "obstacles", "export: refusals"),
        ("FORMAT", "write", "export: write"),
        ("FORMAT", "check", "export: check"),
    ),
}


def measured(
    what: str, before: list[str], arguments: list[str], format_name: str, host_mb: float | None, queue: Any
) -> None:
    """In a process of its own: runs a command on a small model, then on the large one, and sends the peaks of that."""
    if host_mb is not None:
        lightning_gsq.system.memory.host_bytes = lambda: int(host_mb * 1e6)
    from lightning_gsq.cli import main
    from lightning_gsq.export import format_of

    if main(before):
        queue.put((1, {}))
        return
    lightning_gsq.system.memory.release()
    peaks = Peaks()
    for module, name, part in PARTS[what]:
        owner: Any = format_of(format_name) if module == "FORMAT" else importlib.import_module(module)
        *path, last = name.split(".")
        for step in path:
            owner = getattr(owner, step)
        peaks.watch(owner, last, part)
    code = main(arguments)
    queue.put((code, peaks.end()))


def peaks_of(
    what: str, before: list[str], arguments: list[str], format_name: str, host_mb: float | None
) -> dict[str, int]:
    """The peaks of a command, after another one."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measured, args=(what, before, arguments, format_name, host_mb, queue))
    process.start()
    process.join()  # what it sends is small enough to wait for it
    code, peaks = (process.exitcode, {}) if process.exitcode else queue.get()
    if code:
        raise SystemExit(f"{what} ended with exit code {code}")
    return dict(peaks)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=300)
    parser.add_argument("--experts", type=int, default=0, help="a Qwen3-MoE with so many a block instead of a Llama")
    parser.add_argument("--fp8", action="store_true", help="its checkpoint is in FP8")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="float32")
    parser.add_argument("--formats", default="native,dequantized", help="to export to, each by itself")
    parser.add_argument("--end_to_end", action="store_true", help="that phase too")
    parser.add_argument(
        "--host_mb", type=float, help="memory that the machine is said to have free, instead of its own"
    )
    os.environ.update(GIVEN_BACK)
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        dtype = getattr(torch, options.dtype)
        phases = ["init", "blocks", *(["end_to_end"] if options.end_to_end else [])]
        fits, folders, sizes = [], [root / "small", root / "large"], (0, 0)
        for folder, blocks in zip(folders, (1, options.blocks), strict=True):
            if options.experts:
                sizes = large_experts(folder / "model", blocks, options.width, options.experts, options.fp8)
            else:
                sizes = large_llama(folder / "model", blocks, options.width, options.vocabulary, dtype)
            config = short_run(folder / "model", folder, phases, options.bits)
            fits.append(["fit", "--config", str(config), *more])
        block, total = sizes
        print(f"model {total / 1e6:,.0f} MB, {options.blocks} blocks of {block / 1e6:.1f} MB\n", flush=True)
        rows = peaks_of("fit", fits[0], fits[1], "", options.host_mb)
        for name in filter(None, options.formats.split(",")):
            small, large = (["export", str(folder / "run"), "--format", name] for folder in folders)
            peaks = peaks_of("export", small, large, name, options.host_mb)
            rows |= {f"{part}, {name}": size for part, size in peaks.items()}
    print("| part | anonymous memory | blocks |\n|---|---|---|")
    for part, size in rows.items():
        print(f"| {part} | {size / 1e6:,.0f} MB | {size / block:.1f} |")


if __name__ == "__main__":
    main()
