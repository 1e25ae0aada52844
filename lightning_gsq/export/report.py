"""What an export prints: which program loads what, and where the bytes go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from lightning_gsq.export.contract import ExportFormat
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.weights.ledger import PARTS, Ledger


def print_loadability(console: Console, chosen: Mapping[ExportFormat, Sequence[ExportedWeight]]) -> None:
    """Prints which program loads which folder, and how exactly; given the weights that each format quantizes."""
    schemes = " and ".join(sorted({str(weight.scheme) for weights in chosen.values() for weight in weights}))
    table = Table("format", "runtime", "weights", title=f"What loads {schemes}", title_justify="left")
    table.add_column("how to load", overflow="fold")
    for format_, weights in chosen.items():
        for runtime in format_.runtimes(weights):
            table.add_row(format_.name, runtime.name, runtime.exactness, runtime.usage.format(folder="FOLDER"))
    console.print(table)


def unpacked(run: PlannedRun, format_: ExportFormat) -> str:
    """What is said of a format whose readers take no quantized embedding or head."""
    dtype = str(run.dtype).removeprefix("torch.")
    names = " and ".join(run.outer)
    return f"{format_.name}: {names}, quantized in the run, rounded to {dtype}: its readers take plain numbers there"


def print_ledger(console: Console, ledger: Ledger, title: str) -> None:
    """Prints where the bytes of a model's weight files go."""
    table = Table("part", "bytes", "bits per quantized weight", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    sums = ledger.summary()
    weights = sums["quantized_weights"]
    for part in PARTS:
        bits, quantized = ledger.total(part), ledger.total(part, quantized_only=True)
        if bits:
            table.add_row(part, f"{bits / 8:,.0f}", f"{quantized / weights:.4f}" if quantized else "")
    table.add_row("headers", f"{sums['bytes']['headers']:,}", "", end_section=True)
    per_weight = f"{sums['bits_per_quantized_weight']:.4f}" if weights else ""
    table.add_row("weight files", f"{ledger.num_bytes:,}", per_weight)
    console.print(table)
    console.print(
        f"{sums['parameters']:,} parameters, {weights:,} of them quantized; {sums['bits_per_parameter']:.4f} bits per "
        "parameter over all",
        soft_wrap=True,
    )
