"""Writing a run in several formats: each into a folder of its own, checked, and only then given its name.

Whatever stops the work midway leaves nothing that looks whole. A format that fails takes no other with it: the others
are written, and what failed is listed at the end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from lightning_gsq.errors import ConfigurationError, WorkFailedError
from lightning_gsq.export import folders, report
from lightning_gsq.export.card import model_card
from lightning_gsq.export.contract import CheckFailedError, CheckReport, ExportFormat, ExportOptions
from lightning_gsq.export.figure import draw_ledger
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.export.preflight import describe, folder_obstacle, inputs_of, obstacles, refuse_exports
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.system.progress_bars import no_foreign_bars
from lightning_gsq.weights.ledger import Ledger
from lightning_gsq.widths.picture import draw_widths


@dataclass
class Exported:
    """What became of each format.

    Args:
        folders: The folders that were written.
        failures: Why the other formats were not.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def verify(self) -> None:
        """Ends well if everything was written.

        Raises:
            WorkFailedError: something was not.
        """
        if self.failures:
            written = f"written: {', '.join(self.folders)}; " if self.folders else ""
            raise WorkFailedError(f"{written}{describe(self.failures)}")


def export_run(
    run: FinishedRun,
    chosen: Sequence[ExportFormat],
    root: Path,
    options: ExportOptions,
    check: bool,
    overwrite: bool,
    console: Console,
    announced: bool = False,
) -> Exported:
    """Writes an opened run in each format.

    Args:
        run: The run.
        chosen: The formats.
        root: The folder that gets one folder a format.
        options: Settings of the writers.
        check: Load each folder back.
        overwrite: Replace earlier exports.
        console: Where to print.
        announced: Whether :func:`announce` has said what the files will be like.

    Raises:
        ConfigurationError: none of the formats can be written; nothing was.
    """
    result = Exported(failures=obstacles(chosen, run, root, overwrite))
    possible = [format_ for format_ in chosen if format_.name not in result.failures]
    if not possible:
        raise ConfigurationError(describe(result.failures))
    for name, reason in result.failures.items():
        console.print(f"{name} is left out: {reason}", soft_wrap=True)
    if not announced:
        report.print_loadability(console, possible, run)
    for format_ in possible:
        folder = root / format_.name
        try:
            ledger, findings = _write(format_.view(run, options), format_, folder, options, check, overwrite)
        except (ConfigurationError, CheckFailedError) as error:
            result.failures[format_.name] = str(error)
        except OSError as error:
            result.failures[format_.name] = f"output: cannot write {folder}: {error.strerror or error}"
        except SafetensorError as error:
            result.failures[format_.name] = f"output: cannot write {folder}: {error}"
        else:
            report.print_ledger(console, ledger, f"{format_.name}: {folder}")
            if findings is not None:
                console.print(findings.describe(), soft_wrap=True)
            _record(run, format_.name, folder, ledger, findings)
            result.folders[format_.name] = folder
            continue
        console.print(f"{format_.name} failed: {result.failures[format_.name]}", soft_wrap=True)
    report.print_usage(console, possible, run, result.folders)
    return result


def announce(chosen: Sequence[ExportFormat], run: PlannedRun, root: Path, reserved: int, console: Console) -> None:
    """Before a run trains: refuses what cannot be written afterwards, and says what the files will be like.

    Args:
        chosen: The formats that the run will be exported to.
        run: The run.
        root: The folder that will get one folder a format.
        reserved: Bytes that will be written to the same disk before.
        console: Where to print.

    Raises:
        ConfigurationError: a format cannot be written; the message says of each why, and what can be done.
    """
    refuse_exports(chosen, run, root, reserved)
    if chosen:
        report.print_loadability(console, chosen, run)


def bring_up_to_date(run: FinishedRun, chosen: Sequence[ExportFormat], console: Console) -> None:
    """Exports a finished run into its own folder, but for formats that are there, whole and current.

    Raises:
        ConfigurationError, WorkFailedError: a format could not be written.
    """
    root, options = run.folder.root / "export", ExportOptions()
    stale = []
    for format_ in chosen:
        made_from = made_of(run, options)
        reason = folders.out_of_date(root / format_.name, format_.name, made_from, checked=True)
        if reason is None:
            console.print(f"{format_.name}: {root / format_.name} is there, whole and current", soft_wrap=True)
        else:
            stale.append(format_)
    if stale:
        done = export_run(run, stale, root, options, check=True, overwrite=True, console=console, announced=True)
        done.verify()


def made_of(run: FinishedRun, options: ExportOptions) -> dict[str, Any]:
    """What the files of an export follow from, as plain data."""
    return {"run": run.digests, "options": dataclasses.asdict(options)}


def _write(
    run: FinishedRun, format_: ExportFormat, folder: Path, options: ExportOptions, check: bool, overwrite: bool
) -> tuple[Ledger, CheckReport | None]:
    with folders.growing(folder) as partial, no_foreign_bars():
        ledger = format_.write(run, partial, options)
        ledger.verify(format_.weight_files(partial))
        findings = format_.check(run, partial) if check else None
        content = {"format": format_.name, "ledger": ledger.as_dict(), "check": _plain(findings)}
        (partial / "ledger.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw_ledger(ledger, partial / "ledger.png")
        if run.recipe.get("choice") is not None:
            parts = {e.name: (e.weights, e.bits / 8) for e in ledger.entries if e.quantized}
            rest = ledger.num_bytes - sum(size for _, size in parts.values())
            draw_widths(parts, rest).savefig(partial / "widths.png", dpi=120)
        (partial / "README.md").write_text(model_card(run, format_, ledger, findings), encoding="utf-8")
        folders.write_mark(partial, format_.name, made_of(run, options), findings is not None)
        reason = folder_obstacle(folder, overwrite, inputs_of(run))  # the writing may have taken hours
        if reason is not None:
            raise ConfigurationError(reason)
        folders.publish(partial, folder)
    return ledger, findings


def _record(run: FinishedRun, name: str, folder: Path, ledger: Ledger, findings: CheckReport | None) -> None:
    """Notes the export in the run's summary."""
    summary = run.folder.summary
    entry = {"folder": str(folder), "ledger": ledger.summary(), "check": _plain(findings)}
    run.folder.write_summary({**summary, "exports": {**summary.get("exports", {}), name: entry}})


def _plain(findings: CheckReport | None) -> dict[str, Any] | None:
    return None if findings is None else dataclasses.asdict(findings)
