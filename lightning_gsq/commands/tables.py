"""Plans, summaries and ledgers as tables."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_gsq.commands.file_types import FileTypes
from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate import Estimate
from lightning_gsq.estimate.phases import Phase
from lightning_gsq.run.report import PERPLEXITY_NAMES, about_text, experts_line, megabytes
from lightning_gsq.run.standard_errors import with_error
from lightning_gsq.system.stopwatch import duration
from lightning_gsq.widths import Choice


def print_summary(console: Console, summary: Mapping[str, Any], folder: str) -> None:
    """Prints the result as a table."""
    table = Table(title="Quantized: " + summary["scheme"]["name"], show_header=False, title_justify="left")
    for key, value in summary["perplexity"].items():
        figure = with_error(value, summary.get("perplexity_error", {}).get(key), 2)
        table.add_row(f"perplexity, {PERPLEXITY_NAMES.get(key, key)}", figure)
    table.add_row("  measured on", about_text(summary["evaluation"]))
    phase = summary.get("end_to_end")
    if phase is not None:
        losses = f"{phase['start']:.4f} → {phase['final']:.4f}"
        table.add_row(
            "held-out loss, end to end", losses + (", rejected: the start stands" if phase["rejected"] else "")
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
    table.add_row("size after", f"{megabytes(sizes['quantized'])}: {_parts(summary)}")
    if "experts" in summary:
        table.add_row("experts", experts_line(summary["experts"]))
    table.add_row("time", f"{_time(summary['seconds'])}, {summary['seconds_per_block']:.1f} s of training a block")
    table.add_row("peak memory", megabytes(summary["peak_memory_bytes"]))
    table.add_row("run folder", folder)
    console.print(table)


def print_next(console: Console, folder: str, pretrained: str, formats: Sequence[str]) -> None:
    """Prints what can be done with a finished run: commands to be copied, a line each.

    Args:
        console: Where to print.
        folder: The run's folder.
        pretrained: Where the original model came from.
        formats: Names of formats that take the run and that it was not exported to just now.
    """
    run, original = shlex.quote(folder), shlex.quote(pretrained)
    console.print("next:")
    exports = [f"lightning-gsq export {run} --format {','.join(formats)}"] if formats else []
    for command in (
        *exports,
        f"lightning-gsq predict {run} --prompt 'Why is the sky blue?'",
        f"lightning-gsq validate {run} --config {shlex.quote(f'{folder}/recipe.yaml')} --against {original}",
        f"lightning-gsq test {run} --tasks arc_easy,piqa --against {original}",
        f"tensorboard --logdir {run}",
    ):
        console.print(f"  {command}", soft_wrap=True)


def _parts(summary: Mapping[str, Any]) -> str:
    """Where the bytes of the result are, in words."""
    sizes = summary["bytes"]
    blocks, outer = sizes["blocks"], sizes.get("outer", 0)
    parts = [f"blocks {megabytes(blocks)}"]
    if outer:
        schemes = " and ".join(f"{name} at {about['scheme']}" for name, about in summary["outer"].items())
        parts.append(f"{megabytes(outer)} outside of them ({schemes})")
    rest = "norms and what else is not quantized" if outer else "embedding, norms, head"
    parts.append(f"{megabytes(sizes['quantized'] - blocks - outer)} left at 16 bits ({rest})")
    return " + ".join(parts)


def print_choice(console: Console, choice: Choice, parts: Mapping[str, tuple[str, int, int]], made_up: bool) -> None:
    """Prints the widths of all matrices, those of one kind together.

    Args:
        console: Where to print.
        choice: The choice.
        parts: What each matrix takes, its weights and its bytes, by name.
        made_up: Whether the run's start makes up for rounding, which the predicted cost then counts.
    """
    console.print(_widths_table(f"Widths for {choice.size} as {choice.runtime}", "widths", parts))
    console.print(
        f"file of {choice.num_bytes:,} bytes, {choice.num_bytes / choice.limit:.2%} of {choice.limit:,}; predicted "
        f"divergence {choice.cost:.4g} nats a token {'after the start' if made_up else 'of plain rounding'}",
        soft_wrap=True,
    )


def print_types(console: Console, types: FileTypes) -> None:
    """Prints the types of a file's matrices, those of one kind together, and what is left alone."""
    console.print(_widths_table(f"Types of {types.file}", "types", types.parts))
    size = sum(part[2] for part in types.parts.values())
    console.print(f"file of {types.file.stat().st_size:,} bytes, {size:,} of them to refine", soft_wrap=True)
    if types.left:
        left = ", ".join(dict.fromkeys(f"{_alike(name)} ({kind})" for name, kind in types.left.items()))
        console.print(f"not quantized in the file, and left as they are: {left}", soft_wrap=True)


def _widths_table(title: str, column: str, parts: Mapping[str, tuple[str, int, int]]) -> Table:
    """What matrices take, those of one kind together; given each one's width, weights and bytes by its name."""
    table = Table(title=title, title_justify="left")
    kinds: dict[str, list[tuple[str, int, int]]] = {}
    for name, part in parts.items():
        kinds.setdefault(_alike(name), []).append(part)
    for name in ("matrices", column, "bits a weight", "size"):
        table.add_column(name, overflow="fold")
    for kind, shares in kinds.items():
        counts = Counter(width for width, _, _ in shares)
        widths = ", ".join(width if count == len(shares) else f"{count} × {width}" for width, count in counts.items())
        weights, size = sum(part[1] for part in shares), sum(part[2] for part in shares)
        table.add_row(kind, widths, f"{8 * size / weights:.2f}", _size(size))
    return table


def _alike(name: str) -> str:
    """The name of a matrix with a star for its numbers: that of all of its kind."""
    return re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight")


def print_estimate(
    console: Console, plan: Estimate, data: CalibrationDataModule, pretrained: str, loaded: bool = False
) -> None:
    """Prints model, memory, disk and time; ``loaded`` says that the model was, for a choice of widths."""
    skeleton = plan.skeleton
    done = "loaded for its widths alone" if loaded else "nothing was loaded, read or written"
    console.print(f"Plan for {pretrained}; {done}", soft_wrap=True)
    table = _table("Model", "", "")
    weights = sum(ledger.weights for ledger in plan.ledgers.values())
    packed = sum(ledger.num_bytes for ledger in plan.ledgers.values())
    size, dtype = skeleton.parameters * skeleton.dtype.itemsize, str(skeleton.dtype).removeprefix("torch.")
    table.add_row("parameters", f"{skeleton.parameters:,}, {_size(size)} in {dtype}")
    table.add_row("blocks", f"{len(plan.plan)} of {len(skeleton.blocks)} to quantize")
    table.add_row("weights to quantize", f"{weights:,} ({weights / skeleton.parameters:.1%} of the parameters)")
    for scheme, ledger in plan.ledgers.items():
        bits = ledger.per_weight()
        table.add_row(
            str(scheme),
            f"{ledger.weights:,} weights, {bits['total']:.3f} bits each ({bits['codes']:.3f} codes + "
            f"{bits['scales']:.3f} scales), {_size(ledger.num_bytes)}",
        )
    for name, (scheme, ledger) in plan.outer.items():
        table.add_row(f"{name}, {scheme}", f"{ledger.weights:,} weights, {_size(ledger.num_bytes)}")
        weights, packed = weights + ledger.weights, packed + ledger.num_bytes
    dense = 2 * (skeleton.parameters - weights)
    table.add_row("result", f"{_size(packed + dense)}, {_size(dense)} of it at 16 bits")
    console.print(table)
    console.print(_memory(plan))
    table = _table("Disk", "", "")
    for name, count in plan.run_folder.items():
        table.add_row(f"run folder: {name}", _size(count))
    where = "in memory-mapped files" if plan.mapped else "in memory, none on disk"
    table.add_row("hidden states", f"{_size(plan.streams)}, {where}")
    if plan.windows:
        table.add_row("hidden states of the evaluation windows", f"{_size(plan.windows)}, in memory-mapped files")
    console.print(table)
    table = _table("Work", "", "")
    if any(phase.name.startswith("blocks") for phase in plan.phases):
        tokens = plan.steps * data.batch_size * data.sequence_length
        table.add_row("steps", f"{plan.steps:,} a block, {plan.steps * len(plan.plan):,} in all")
        table.add_row("tokens that train a block", f"{tokens:,}")
    if plan.choosing is not None:
        done = "; done, fit takes the choice as it is" if loaded else ""
        table.add_row("choosing the widths", f"about {duration(plan.choosing)}{done}")
    elif plan.choosing_unknown:
        table.add_row("choosing the widths", f"not estimated: {plan.choosing_unknown}")
    if plan.timing is None or plan.seconds is None:
        table.add_row("time", f"not estimated: {plan.probed}")
    else:
        timing = plan.timing
        table.add_row(
            "measured on one block of random weights",
            ("" if timing.step is None else f"{timing.step * 1e3:,.0f} ms a step, ")
            + f"{timing.forward * 1e3:,.0f} ms a forward pass, "
            f"{timing.watched * 1e3:,.0f} ms to watch a sequence for the start, {timing.rounding:,.1f} s to round",
        )
        if plan.end_to_end is not None:
            work = plan.end_to_end
            table.add_row(
                "end to end",
                f"{work.steps:,} steps of about {work.a_step:,.1f} s, with evaluations about {duration(work.seconds)}",
            )
        seconds, without = plan.seconds, "measuring perplexity"
        if not loaded:
            seconds += plan.choosing or 0
            without += " and choosing the widths" if plan.choosing_unknown else ""
        table.add_row("time", f"about {duration(seconds)} without {without}")
    console.print(table)
    if not plan.problems:
        console.print("fits")


def _memory(plan: Estimate) -> Table:
    table = _table("Peak memory, phase by phase", "", "host and device" if plan.on_host else "host")
    if not plan.on_host:
        table.add_column("device", justify="right")
    worst = plan.peak
    for phase in plan.phases:
        for host, device, name in _terms(phase):
            cells = [_size(host + device)] if plan.on_host else [_size(host), _size(device)]
            table.add_row(f"  {name}", *cells)
        totals = phase.total(plan.on_host)
        marks = ["  <- peak" if total == most and total else "" for total, most in zip(totals, worst, strict=True)]
        cells = [f"{_size(totals[0])}{marks[0]}"]
        if not plan.on_host:
            cells.append(f"{_size(totals[1])}{marks[1]}")
        table.add_row(*(Text(cell, style="bold") for cell in (phase.name, *cells)), end_section=True)
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


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _size(count: float) -> str:
    if count == 0:
        return ""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else megabytes(count)
