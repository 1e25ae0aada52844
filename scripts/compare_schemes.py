"""Perplexity of full precision, RTN, GPTQ and GSQ for several bit widths, as one table.

    python scripts/compare_schemes.py --calibration wiki.txt --evaluation wiki.test.raw --folder runs/compare

Every cell is a run folder made by the command line, so a stopped comparison resumes where it was. GPTQ is a run that
stops after its warm start; RTN is the warm start of the GSQ run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from runs import summary_of, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", nargs="+", default=["1", "ternary", "2", "3", "4"])
    parser.add_argument("--calibration", help="text file; Python's documentation if left out")
    parser.add_argument("--evaluation", help="text file; Python's documentation if left out")
    parser.add_argument("--folder", default="runs/compare", help="where the run folders go")
    parser.add_argument("--windows", default="24", help="evaluation windows of 1,024 tokens")
    options, further = parser.parse_known_args()
    common = [*texts(options.calibration, options.evaluation), *further]
    common.append(f"--evaluation.num_windows={options.windows}")
    table = Table(title="Perplexity")
    columns = ("bits", "true bits a weight", "full precision", "RTN", "GPTQ", "GSQ", "end to end", "seconds a block")
    for column in columns:
        table.add_column(column, justify="right")
    for bits in options.bits:
        folder = Path(options.folder)
        own = [*common, f"--model.scheme.bits={bits}"]
        rounded = [*own, "--model.warm_start=lightning_gsq.quantizers.GPTQ", "--model.phases=[init]"]
        trained = [*own, "--model.warm_start=RTN", "--model.phases=[init,blocks,end_to_end]"]
        gsq = summary_of(folder / f"gsq-{bits}", trained, "blocks")
        gptq = summary_of(folder / f"gptq-{bits}", rounded, "warm_start")
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
