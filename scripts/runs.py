"""Runs of the command line, each in a folder of its own, for the scripts that compare them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_gsq.data import PythonDocumentation, TextFile, TextSource

CONFIG = Path(__file__).parents[1] / "cli.yaml"


def summary_of(folder: Path, arguments: list[str], result: str) -> dict[str, Any]:
    """The summary of a run, which is made, or goes on, if it has no such perplexity yet.

    Weights in the blocks are compared: the embedding stays as it is, unless the arguments say otherwise.

    Args:
        folder: The run folder.
        arguments: Of ``fit``, beside ``cli.yaml`` and the folder.
        result: Of the perplexities: warm_start, blocks or end_to_end.
    """
    file = folder / "summary.json"
    if not file.exists() or result not in json.loads(file.read_text())["perplexity"]:
        command = [sys.executable, "-m", "lightning_gsq", "fit", "--config", str(CONFIG)]
        subprocess.run(
            [*command, f"--trainer.default_root_dir={folder}", "--model.embedding=null", *arguments], check=True
        )
    return dict(json.loads(file.read_text()))


def result_of(phases: Sequence[str]) -> str:
    """The perplexity of a summary, as :func:`summary_of` names it, that a run of these phases ends with."""
    return "warm_start" if phases[-1] == "init" else phases[-1]


def texts(calibration: str | None, evaluation: str | None) -> list[str]:
    """Arguments that read a document from each row of local files; Python's documentation where there is none."""
    return [
        argument
        for option, path in (("data", calibration), ("evaluation", evaluation))
        if path is not None
        for argument in (
            f"--{option}.source=lightning_gsq.data.TextFile",
            f"--{option}.source.path={path}",
            f"--{option}.source.rows=true",
        )
    ]


def text_of(path: str | None, part: Literal["calibration", "evaluation"] = "calibration") -> TextSource:
    """A document from each row of a local file; a part of Python's documentation where there is none."""
    return PythonDocumentation(part=part) if path is None else TextFile(path, rows=True)


def has_row(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the results of a comparison, lines of JSON, have a row with these entries."""
    file = folder / "results.jsonl"
    return file.exists() and any(wanted.items() <= json.loads(line).items() for line in file.read_text().splitlines())


def add_row(folder: Path, row: dict[str, Any]) -> None:
    """Adds a row to the results, and prints it."""
    line = json.dumps(row)
    with (folder / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)
