"""Perplexity of full precision, RTN, GPTQ and GSQ for several bit widths, as one table.

    python scripts/compare_schemes.py --calibration wiki.txt --evaluation wiki.test.raw --folder runs/compare

Every cell is a run folder made by the command line, so a stopped comparison resumes where it was. GPTQ is a run that
stops after its warm start; RTN is the warm start of the GSQ run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


def run(folder: Path, arguments: list[str]) -> dict:
    """The summary of a run folder, made first if it is not there."""
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "lightning_gsq", "fit", "--config", str(ROOT / "cli.yaml")]
        subprocess.run([*command, "--trainer.default_root_dir", str(folder), *arguments], check=True)
    return json.loads((folder / "summary.json").read_text())


def text(option: str, path: str | None) -> list[str]:
    """Arguments that read rows of a local file."""
    if path is None:
        return []
    return [
        f"--{option}.source=lightning_gsq.data.TextFile",
        f"--{option}.source.path={path}",
        f"--{option}.source.rows=true",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", nargs="+", default=["1", "ternary", "2", "3", "4"])
    parser.add_argument("--calibration", help="text file; Python's documentation if left out")
    parser.add_argument("--evaluation", help="text file; Python's documentation if left out")
    parser.add_argument("--folder", default="runs/compare", help="where the run folders go")
    parser.add_argument("--windows", default="24", help="evaluation windows of 1,024 tokens")
    options, further = parser.parse_known_args()
    common = [*text("data", options.calibration), *text("evaluation", options.evaluation), *further]
    common.append(f"--evaluation.num_windows={options.windows}")
    table = Table(title="Perplexity")
    columns = ("bits", "true bits a weight", "full precision", "RTN", "GPTQ", "GSQ", "end to end", "seconds a block")
    for column in columns:
        table.add_column(column, justify="right")
    for bits in options.bits:
        folder = Path(options.folder)
        gsq = run(folder / f"gsq-{bits}", [*common, f"--model.scheme.bits={bits}"])
        gptq = run(
            folder / f"gptq-{bits}",
            [
                *common,
                f"--model.scheme.bits={bits}",
                "--model.warm_start=lightning_gsq.quantizers.GPTQ",
                "--model.phases=[init]",
            ],
        )
        perplexity = gsq["perplexity"]
        table.add_row(
            bits,
            f"{gsq['bits_per_weight']['total']:.2f}",
            f"{perplexity['full_precision']:.2f}",
            f"{perplexity['warm_start']:.2f}",
            f"{gptq['perplexity']['warm_start']:.2f}",
            f"{perplexity['blocks']:.2f}",
            f"{perplexity['end_to_end']:.2f}" if "end_to_end" in perplexity else "",
            f"{gsq['seconds_per_block']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
