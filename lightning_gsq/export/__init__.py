"""Files that other programs load, from a finished run.

contract     what a format is
registry     the formats by name; how to add one
planned      what will be exported, known before training
source       a finished run, one weight at a time
opening      opens one
formats      one file a format
readers      programs that read exported files
writer       weight files, shard by shard, with their ledger
companions   configuration and tokenizer beside them
check        loads an export back
preflight    can these formats be written at all?
folders      which folders are an export's own, and their names
engine       writes, checks and replaces folders
packed_run   a finished run in memory, packed
report       what is printed
bits_table   how many bits a weight takes in each file
card, figure  model card and figure of a folder
hub          uploads it
"""

from lightning_gsq.export import formats
from lightning_gsq.export.contract import CheckFailedError, CheckReport, ExportFormat, ExportOptions, Runtime
from lightning_gsq.export.opening import open_run
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.registry import all_formats, format_of, register
from lightning_gsq.export.source import FinishedRun

__all__ = [
    "CheckFailedError",
    "CheckReport",
    "ExportFormat",
    "ExportOptions",
    "ExportedWeight",
    "FinishedRun",
    "PlannedRun",
    "Runtime",
    "all_formats",
    "format_of",
    "formats",
    "open_run",
    "register",
]
