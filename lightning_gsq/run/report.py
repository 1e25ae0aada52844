"""The end of a run: the summary as a mapping and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_gsq.weights.quantized import BitsLedger, QuantizedWeight

PERPLEXITY_NAMES = {
    "full_precision": "full precision",
    "warm_start": "after the warm start",
    "blocks": "after the blocks",
    "end_to_end": "after the end-to-end phase",
}


def ledger_of(blocks: Iterable[Mapping[str, QuantizedWeight]]) -> BitsLedger:
    """The ledger of all weights of all blocks."""
    return sum((BitsLedger.of(tensor) for block in blocks for tensor in block.values()), BitsLedger())


def saliency_of(blocks: Mapping[str, Mapping[str, QuantizedWeight]]) -> dict[str, dict[str, Any]]:
    """What was chosen for each weight that has a salient part, by full parameter name."""
    return {
        f"{prefix}.{name}": {
            **dataclasses.asdict(tensor.scheme.salient),
            "bits_of_others": tensor.scheme.bits,
            "group_size_of_others": tensor.scheme.group_size,
            "true_bits": BitsLedger.of(tensor).per_weight()["total"],
        }
        for prefix, block in blocks.items()
        for name, tensor in block.items()
        if tensor.scheme.salient is not None
    }


def print_summary(console: Console, summary: Mapping[str, Any], folder: str) -> None:
    """Prints the result as a table."""
    table = Table(title="Quantized: " + summary["scheme"]["name"], show_header=False, title_justify="left")
    for key, value in summary["perplexity"].items():
        table.add_row(f"perplexity, {PERPLEXITY_NAMES.get(key, key)}", f"{value:.2f}")
    phase = summary.get("end_to_end")
    if phase is not None:
        losses = f"{phase['start']:.4f} → {phase['final']:.4f}"
        table.add_row(
            "held-out loss, end to end", losses + (", rejected: the blocks stand" if phase["rejected"] else "")
        )
    bits = summary["bits_per_weight"]
    table.add_row(
        "true bits per weight",
        f"{bits['total']:.3f}  ({bits['codes']:.3f} codes + {bits['scales']:.3f} scales"
        + (f" + {bits['positions']:.3f} positions)" if bits["positions"] else ")"),
    )
    sizes = summary["bytes"]
    table.add_row(
        "size before",
        f"{megabytes(sizes['original'])} as loaded from, {megabytes(sizes['dense'])} at 16 bits",
    )
    table.add_row(
        "size after",
        f"{megabytes(sizes['quantized'])}: blocks {megabytes(sizes['blocks'])} + "
        f"{megabytes(sizes['quantized'] - sizes['blocks'])} left at 16 bits (embedding, norms, head)",
    )
    table.add_row(
        "time", f"{summary['seconds'] / 60:.1f} min, {summary['seconds_per_block']:.1f} s of training a block"
    )
    table.add_row("peak memory", megabytes(summary["peak_memory_bytes"]))
    table.add_row("run folder", folder)
    console.print(table)


def megabytes(count: float) -> str:
    """A size for people."""
    return f"{count / 1e6:,.1f} MB"
