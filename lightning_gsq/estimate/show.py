"""A plan as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate.estimate import Estimate
from lightning_gsq.estimate.terms import Phase


def print_estimate(console: Console, found: Estimate, data: CalibrationDataModule, pretrained: str) -> None:
    """Prints model, memory, disk and time."""
    skeleton = found.skeleton
    console.print(f"Plan for {pretrained}; nothing was loaded, read or written", soft_wrap=True)
    table = _table("Model", "", "")
    weights = sum(ledger.weights for ledger in found.ledgers.values())
    packed = sum(ledger.num_bytes for ledger in found.ledgers.values())
    size, dtype = skeleton.parameters * skeleton.dtype.itemsize, str(skeleton.dtype).removeprefix("torch.")
    table.add_row("parameters", f"{skeleton.parameters:,}, {_size(size)} in {dtype}")
    table.add_row("blocks", f"{len(found.plan)} of {len(skeleton.blocks)} to quantize")
    table.add_row("weights to quantize", f"{weights:,} ({weights / skeleton.parameters:.1%} of the parameters)")
    for scheme, ledger in found.ledgers.items():
        bits = ledger.per_weight()
        table.add_row(
            str(scheme),
            f"{ledger.weights:,} weights, {bits['total']:.3f} bits each ({bits['codes']:.3f} codes + "
            f"{bits['scales']:.3f} scales), {_size(ledger.num_bytes)}",
        )
    kept = 2 * (skeleton.parameters - weights)
    table.add_row("result", f"{_size(packed + kept)}, {_size(kept)} of it at 16 bits")
    console.print(table)
    console.print(_memory(found))
    table = _table("Disk", "", "")
    for name, count in found.run_folder.items():
        table.add_row(f"run folder: {name}", _size(count))
    where = "in memory-mapped files" if found.mapped else "in memory, none on disk"
    table.add_row("hidden states", f"{_size(found.streams)}, {where}")
    if found.windows:
        table.add_row("hidden states of the evaluation windows", f"{_size(found.windows)}, in memory-mapped files")
    console.print(table)
    table = _table("Work", "", "")
    tokens = found.steps * data.batch_size * data.sequence_length
    table.add_row("steps", f"{found.steps:,} a block, {found.steps * len(found.plan):,} in all")
    table.add_row("tokens that train a block", f"{tokens:,}")
    if found.timing is None or found.seconds is None:
        table.add_row("time", f"not estimated: {found.probed}")
    else:
        timing = found.timing
        table.add_row(
            "measured on one block of random weights",
            f"{timing.step * 1e3:,.0f} ms a step, {timing.forward * 1e3:,.0f} ms a forward pass, warm start about "
            f"{timing.rounding:,.1f} s",
        )
        table.add_row("time", f"about {_duration(found.seconds)} without measuring perplexity")
    console.print(table)
    if not found.problems:
        console.print("fits")


def _memory(found: Estimate) -> Table:
    table = _table("Peak memory, phase by phase", "", "host and device" if found.on_host else "host")
    if not found.on_host:
        table.add_column("device", justify="right")
    worst = found.peak
    for phase in found.phases:
        for host, device, name in _terms(phase):
            cells = [_size(host + device)] if found.on_host else [_size(host), _size(device)]
            table.add_row(f"  {name}", *cells)
        totals = phase.total(found.on_host)
        marks = ["  <- peak" if total == most and total else "" for total, most in zip(totals, worst, strict=True)]
        cells = [f"{_size(totals[0])}{marks[0]}"]
        if not found.on_host:
            cells.append(f"{_size(totals[1])}{marks[1]}")
        table.add_row(f"[bold]{phase.name}[/bold]", *(f"[bold]{cell}[/bold]" for cell in cells), end_section=True)
    return table


def _terms(phase: Phase) -> list[tuple[int, int, str]]:
    return [(count, 0, name) for name, count in phase.host.items()] + [
        (0, count, name) for name, count in phase.device.items()
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and any(columns) else "left")
    return table


def _size(count: float) -> str:
    if count == 0:
        return ""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
