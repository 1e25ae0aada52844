"""Writing a run in several formats: each into a folder of its own, checked, and only then given its name.

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
from typing import Any, TypeVar

from rich.console import Console

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.card import model_card
from lightning_gsq.export.contract import CheckReport, ExportFormat, ExportOptions
from lightning_gsq.export.figure import draw_ledger
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.export.report import print_ledger, print_loadability, unpacked
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.weights.ledger import Ledger

Run = TypeVar("Run", bound=PlannedRun)


def check_free(folder: Path) -> None:
    """Verifies that nothing is there.

    Raises:
        ConfigurationError: something is.
    """
    if folder.exists():
        raise ConfigurationError(f"output: {folder} exists; use --overwrite to replace it, or another --output")


def seen_by(format_: ExportFormat, run: Run) -> Run:
    """The run with those quantized weights that the format holds."""
    return run if format_.outer or not run.outer else run.within_blocks()


def check_possible(chosen: Sequence[ExportFormat], run: PlannedRun) -> None:
    """Verifies that every format can hold a run.

    Raises:
        ConfigurationError: one cannot; the message names one that can.
    """
    mixed = next((weight.name for weight in run.weights.values() if weight.scheme.mixed), None)
    unable = [format_.name for format_ in chosen if not format_.salient]
    if mixed is not None and unable:
        raise ConfigurationError(
            f"format: {mixed} has salient weights of other bits, which {', '.join(unable)} cannot hold; use native or "
            "dequantized"
        )
    refusals = [reason for reason in (format_.refuse(seen_by(format_, run)) for format_ in chosen) if reason]
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
    """Writes an opened run in each format, replacing folders that are there; see ``commands.export``."""
    check_possible(chosen, run)
    views = {format_.name: seen_by(format_, run) for format_ in chosen}
    print_loadability(console, {format_: list(views[format_.name].weights.values()) for format_ in chosen})
    folders = {}
    for format_ in chosen:
        folder, view = root / format_.name, views[format_.name]
        if len(view.weights) < len(run.weights):
            console.print(unpacked(run, format_), soft_wrap=True)
        ledger, report = _write(view, format_, folder, options, check)
        print_ledger(console, ledger, f"{format_.name}: {folder}")
        if report is not None:
            console.print(report.describe(), soft_wrap=True)
        _record(run, format_.name, folder, ledger, report)
        folders[format_.name] = folder
    return folders


def _write(
    run: FinishedRun, format_: ExportFormat, folder: Path, options: ExportOptions, check: bool
) -> tuple[Ledger, CheckReport | None]:
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        ledger = format_.write(run, partial, options)
        ledger.verify(format_.weight_files(partial))
        report = format_.check(run, partial) if check else None
        content = {"format": format_.name, "ledger": ledger.as_dict(), "check": _plain(report)}
        (partial / "ledger.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw_ledger(ledger, partial / "ledger.png")
        (partial / "README.md").write_text(model_card(run, format_, ledger, report), encoding="utf-8")
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
