"""What ``export`` does, from a run folder to folders that other programs load.

A folder is written under a hidden name, checked by loading it back, and only then given its own: whatever stops the
command midway leaves nothing that looks whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lightning_gsq.commands.tables import print_ledger
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.card import model_card
from lightning_gsq.export.figure import draw_ledger
from lightning_gsq.export.formats.base import CheckReport, ExportFormat, ExportOptions, format_of
from lightning_gsq.export.hub import check_name, push
from lightning_gsq.export.source import ExportedWeight, FinishedRun, open_run
from lightning_gsq.system.console import make_console
from lightning_gsq.weights.ledger import Ledger


def export(
    run: str,
    format: list[str],
    output: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    shard_size_gb: float = 5.0,
    gguf_embedding: Literal["F16", "Q8_0"] | None = None,
    gguf_projection: Literal["Q4_0", "Q5_0", "Q8_0"] = "Q8_0",
    push_to_hub: str | None = None,
    private: bool = True,
    console: Console | None = None,
) -> dict[str, Path]:
    """Writes a finished run as files that other programs load.

    Args:
        run: The run folder.
        format: Formats to write, such as native, dequantized, compressed-tensors, gptq or gguf; several at once.
        output: Folder to write to, one inside it for each format; by default the folder export of the run.
        overwrite: Replace folders that are there already.
        check: Load each folder back with the package that reads it, and compare weights, logits, text and perplexity.
        shard_size_gb: Size in GB after which a new weight file begins.
        gguf_embedding: Type of embedding and head in a GGUF file; null for that of the GGUF file that the run started
            from, or F16.
        gguf_projection: Type that a GGUF file rounds those matrices to that no block type holds exactly.
        push_to_hub: Name of a repository on the Hugging Face hub to upload to; several formats need {format} in it.
        private: Whether a new repository is private.
        console: Where to print.

    Returns:
        The folder of each format.

    Raises:
        ConfigurationError: something asked for cannot be done; raised before anything is written.
    """
    console = console or make_console()
    chosen = [format_of(name) for name in dict.fromkeys(format)]
    if not chosen:
        raise ConfigurationError("format: name at least one, such as --format native")
    if shard_size_gb <= 0:
        raise ConfigurationError(f"shard_size_gb must be positive, got {shard_size_gb}")
    if push_to_hub is not None:
        check_name(push_to_hub, len(chosen))
    root = Path(output).expanduser() if output else Path(run).expanduser() / "export"
    for own in chosen:
        if not overwrite:
            check_free(root / own.name)
    opened = open_run(run)
    options = ExportOptions(int(shard_size_gb * 1e9), gguf_embedding, gguf_projection)
    folders = export_run(opened, chosen, root, options, check, console)
    if push_to_hub is not None:
        for name, folder in folders.items():
            console.print(f"uploaded to {push(folder, push_to_hub.format(format=name), private)}", soft_wrap=True)
    return folders


def check_free(folder: Path) -> None:
    """Verifies that nothing is there.

    Raises:
        ConfigurationError: something is.
    """
    if folder.exists():
        raise ConfigurationError(f"output: {folder} exists; use --overwrite to replace it, or another --output")


def check_possible(chosen: Sequence[ExportFormat], weights: Sequence[ExportedWeight]) -> None:
    """Verifies that every format can hold these weights.

    Raises:
        ConfigurationError: one cannot; the message names one that can.
    """
    mixed = next((weight.name for weight in weights if weight.scheme.mixed), None)
    unable = [own.name for own in chosen if not own.salient]
    if mixed is not None and unable:
        raise ConfigurationError(
            f"format: {mixed} has salient weights of other bits, which {', '.join(unable)} cannot hold; use native or "
            "dequantized"
        )
    refusals = [reason for reason in (own.refuse(weights) for own in chosen) if reason]
    if refusals:
        raise ConfigurationError("format: " + "\n".join(refusals))


def export_run(
    run: FinishedRun,
    chosen: Sequence[ExportFormat],
    root: Path,
    options: ExportOptions,
    check: bool,
    console: Console,
) -> dict[str, Path]:
    """Writes an opened run in each format, replacing folders that are there; see :func:`export`."""
    weights = list(run.weights.values())
    check_possible(chosen, weights)
    print_loadability(console, chosen, weights)
    folders = {}
    for own in chosen:
        folder = root / own.name
        ledger, report = _write(run, own, folder, options, check)
        print_ledger(console, ledger, f"{own.name}: {folder}")
        if report is not None:
            console.print(report.describe(), soft_wrap=True)
        _record(run, own.name, folder, ledger, report)
        folders[own.name] = folder
    return folders


def print_loadability(console: Console, chosen: Sequence[ExportFormat], weights: Sequence[ExportedWeight]) -> None:
    """Prints which program loads which folder, and how exactly."""
    schemes = " and ".join(sorted({str(weight.scheme) for weight in weights}))
    table = Table("format", "runtime", "weights", title=f"What loads {schemes}", title_justify="left")
    table.add_column("how to load", overflow="fold")
    for own in chosen:
        for runtime in own.runtimes(weights):
            table.add_row(own.name, runtime.name, runtime.exactness, runtime.usage.format(folder="FOLDER"))
    console.print(table)


def _write(
    run: FinishedRun, own: ExportFormat, folder: Path, options: ExportOptions, check: bool
) -> tuple[Ledger, CheckReport | None]:
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        ledger = own.write(run, partial, options)
        ledger.verify(own.weight_files(partial))
        report = own.check(run, partial) if check else None
        content = {"format": own.name, "ledger": ledger.as_dict(), "check": _plain(report)}
        (partial / "ledger.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw_ledger(ledger, partial / "ledger.png")
        (partial / "README.md").write_text(model_card(run, own, ledger, report), encoding="utf-8")
        replace(partial, folder)
    except OSError as error:
        raise ConfigurationError(f"output: cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ledger, report


def replace(partial: Path, folder: Path) -> None:
    """Gives a finished folder its name; what was there before goes away only once the new one stands."""
    old = partial.with_suffix(".old")
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _record(run: FinishedRun, name: str, folder: Path, ledger: Ledger, report: CheckReport | None) -> None:
    """Notes the export in the run's summary."""
    summary = run.folder.summary
    entry = {"folder": str(folder), "ledger": ledger.summary(), "check": _plain(report)}
    run.folder.write_summary({**summary, "exports": {**summary.get("exports", {}), name: entry}})


def _plain(report: CheckReport | None) -> dict[str, Any] | None:
    return None if report is None else dataclasses.asdict(report)
