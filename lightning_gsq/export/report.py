"""What an export prints: which program loads what, how, and where the bytes go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_gsq.export.bits_table import print_bits
from lightning_gsq.export.contract import ExportFormat
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.export.readers.packages import missing
from lightning_gsq.weights.ledger import PARTS, Ledger


def print_loadability(console: Console, chosen: Sequence[ExportFormat], run: PlannedRun) -> None:
    """Prints which program loads each format, how exactly, what it takes, and what a user should know of it."""
    schemes = " and ".join(sorted({str(weight.scheme) for weight in run.weights.values()}))
    console.print(f"What loads {schemes}", soft_wrap=True)
    table = Table("format", "runtime", "weights")
    for format_ in chosen:
        name = format_.name
        for runtime in format_.runtimes(list(format_.view(run).weights.values())):
            table.add_row(name, runtime.name, runtime.exactness)
            name = ""
    console.print(table)
    print_bits(console, chosen, run, sum(parameter.numel() for parameter in run.network.parameters()))
    for format_ in chosen:
        view = format_.view(run)
        remarks = format_.remarks(view)
        if view.outer != run.outer:
            remarks.append(unpacked(run))
        if format_.package is not None and missing(format_.package):
            remarks.append(missing(format_.package))
        for remark in remarks:
            console.print(f"{format_.name}: {remark}", soft_wrap=True)


def print_usage(console: Console, chosen: Sequence[ExportFormat], run: PlannedRun, folders: Mapping[str, Path]) -> None:
    """Prints how to load each folder: one line a program, with the folder's path, to be copied."""
    for format_ in chosen:
        if format_.name in folders:
            weights = list(format_.view(run).weights.values())
            console.print(f"load {format_.name}:")
            for runtime in format_.runtimes(weights):
                console.print(
                    f"  {runtime.name}: {runtime.how(str(folders[format_.name]), run.auto_class)}", soft_wrap=True
                )


def unpacked(run: PlannedRun) -> str:
    """What is said of a format whose readers take no quantized embedding or head."""
    dtype = str(run.dtype).removeprefix("torch.")
    names = " and ".join(run.outer)
    return f"{names}, quantized in the run, rounded to {dtype}: readers take plain numbers there"


def print_ledger(console: Console, ledger: Ledger, title: str) -> None:
    """Prints where the bytes of a model's weight files go."""
    console.print(title, soft_wrap=True)
    table = Table("part", "bytes", "bits per quantized weight")
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
