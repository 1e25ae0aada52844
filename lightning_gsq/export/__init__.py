"""Files that other programs load, from a finished run."""

from lightning_gsq.export.formats.base import (
    CheckFailedError,
    CheckReport,
    ExportFormat,
    ExportOptions,
    Runtime,
    formats,
)
from lightning_gsq.export.source import ExportedWeight, FinishedRun, open_run

__all__ = [
    "CheckFailedError",
    "CheckReport",
    "ExportFormat",
    "ExportOptions",
    "ExportedWeight",
    "FinishedRun",
    "Runtime",
    "formats",
    "open_run",
]
