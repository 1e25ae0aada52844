"""WikiText-2 perplexity against true bits, near one bit a weight: a table, a plot, and a run folder for every point.

    python scripts/compare_near_binary.py --calibration wiki.txt --evaluation wiki.test.raw --folder runs/near-binary

Every point is a run of the command line into its own folder; a stopped comparison goes on where it was, run by run
and block by block. ``--only PATTERN`` makes some of them, ``--list`` names them. Further arguments go to every run.

| family | what |
|---|---|
| RTN | signs and plain rounding, no training |
| GPTQ | signs with error feedback, no training |
| PB-LLM-like | salient weights anywhere at 8 bits (arXiv 2310.00034), one scale for all signs |
| BiLLM-like | salient columns by the Hessian at 2 bits, error feedback, no training (arXiv 2402.04291) |
| SAGE, element | the published layout (arXiv 2606.05429): any weight salient, any weight in any group |
| SAGE, columns | salient columns, groups of a row's segment, no training |
| SAGE, trained | the same, trained against the blocks' outputs |
| SAGE, trained, end to end | after the end-to-end phase |
| GSQ | binary and ternary without a salient part (arXiv 2604.18556) |
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from runs import summary_of, texts

START = "lightning_gsq.quantizers.DualMode"
PHASES = {"warm_start": "[init]", "blocks": "[blocks]", "end_to_end": "[blocks, end_to_end]"}
PARTS = ("statistics", "saliency", "warm_start", "training")
MARKS = {
    "RTN": "x",
    "GPTQ": "+",
    "PB-LLM-like": "1",
    "BiLLM-like": "2",
    "SAGE, element": "v",
    "SAGE, columns": "s",
    "SAGE, trained": "o",
    "SAGE, trained, end to end": "*",
    "GSQ": "^",
    "GSQ, end to end": "P",
}


@dataclass(frozen=True)
class Point:
    """One run and the perplexity that is read from it.

    Args:
        name: Of the run folder; points of one run share it.
        family: Its curve.
        scheme: ``--model.scheme`` of the run.
        result: Which perplexity: warm_start, blocks or end_to_end.
        warm_start: Class and settings.
    """

    name: str
    family: str
    scheme: str
    result: str
    warm_start: str = f"{{class_path: {START}}}"


def columns(bits: int, ratio: float, group_size: int = 64) -> str:
    """A scheme with salient columns and a table of 16 scales."""
    part = f"{{ratio: {ratio}, bits: {bits}, score: hessian, scale_groups: 16}}"
    return f"{{bits: 1, group_size: {group_size}, salient: {part}}}"


def element(groups: int | str, ratio: float | str = 0.01, bits: int = 4) -> str:
    """A scheme in the published layout."""
    return f"{{bits: 1, salient: {{layout: element, ratio: {ratio}, bits: {bits}, scale_groups: {groups}}}}}"


def points(budgets: list[float]) -> list[Point]:
    """All points, the cheap ones first."""
    rounding = "{class_path: lightning_gsq.quantizers.RTN, init_args: {weighted: false}}"
    nearest = f"{{class_path: {START}, init_args: {{feedback: false, weighted: false}}}}"
    # Training ends lower from codes that do not answer to each other's errors (docs/sage.md).
    plain = f"{{class_path: {START}, init_args: {{feedback: false}}}}"
    found = [Point(f"rtn-g{g}", "RTN", f"{{bits: 1, group_size: {g}}}", "warm_start", rounding) for g in (128, 64)]
    found += [
        Point(
            "gptq-g64", "GPTQ", "{bits: 1, group_size: 64}", "warm_start", "{class_path: lightning_gsq.quantizers.GPTQ}"
        ),
        Point("pbllm-10", "PB-LLM-like", element(1, 0.1, 8), "warm_start", nearest),
        Point(
            "billm-6",
            "BiLLM-like",
            "{bits: 1, group_size: 128, salient: {ratio: 0.06, bits: 2, score: hessian}}",
            "warm_start",
        ),
    ]
    for groups in (1, 2, 4, 8, "graph"):
        found.append(Point(f"element-{groups}", "SAGE, element", element(groups), "warm_start", nearest))
    found.append(Point("element-searched", "SAGE, element", element("graph", "null"), "warm_start", nearest))
    found.append(Point("columns-6", "SAGE, columns", columns(3, 0.06), "warm_start"))
    for budget in budgets:
        found.append(Point(f"columns-{budget}", "SAGE, columns", budget_scheme(budget), "warm_start"))
    for group_size in (128, 64, 32):
        scheme = f"{{bits: 1, group_size: {group_size}}}"
        found.append(Point(f"gsq-1-g{group_size}", "GSQ", scheme, "blocks", plain))
        found.append(Point(f"gsq-1-g{group_size}", "GSQ, end to end", scheme, "end_to_end", plain))
    ternary = "{bits: ternary, group_size: 64}"
    found.append(Point("gsq-ternary", "GSQ", ternary, "blocks"))
    found.append(Point("gsq-ternary", "GSQ, end to end", ternary, "end_to_end"))
    for budget in budgets:
        scheme = budget_scheme(budget)
        found.append(Point(f"trained-{budget}", "SAGE, trained", scheme, "blocks", plain))
        found.append(Point(f"trained-{budget}", "SAGE, trained, end to end", scheme, "end_to_end", plain))
    return found


def budget_scheme(budget: float) -> str:
    """Signs, salient columns and groups within a budget of true bits."""
    return f"{{bits: 1, budget: {budget}}}"


def row_of(point: Point, summary: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    bits = summary["bits_per_weight"]
    seconds = summary["seconds_of"]
    # Blocks choose and round anew before they train; a run that stops after its warm start has only that.
    parts = summary["seconds_of_block"]["init" if point.result == "warm_start" else "blocks"]
    return {
        "family": point.family,
        "run": point.name,
        **{part: bits[part] for part in ("codes", "scales", "positions", "total")},
        "perplexity": summary["perplexity"][point.result],
        **{f"{part.replace('_', ' ')}, s a block": parts.get(part, 0.0) for part in PARTS},
        "end to end, s": seconds.get("end_to_end", 0.0) if point.result == "end_to_end" else 0.0,
    }


def write(folder: Path, rows: list[dict[str, Any]], full_precision: float) -> str:
    """The table as Markdown and JSON, and the plot."""
    from matplotlib.figure import Figure  # not pyplot: no display

    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (value if isinstance(value, str) else f"{value:.{2 if value >= 10 else 3}f}" for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    (folder / "near_binary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "near_binary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for family, mark in MARKS.items():
        own = sorted((row["total"], row["perplexity"]) for row in rows if row["family"] == family)
        if own:
            axes.plot(*zip(*own, strict=True), mark, linestyle=":" if len(own) > 1 else "", label=family)
    # Bits as the papers of this field count them: codes alone.
    nominal = sorted((row["codes"], row["perplexity"]) for row in rows if row["family"] == "SAGE, element")
    if nominal:
        axes.plot(*zip(*nominal, strict=True), "v", fillstyle="none", color="gray", label="SAGE, element: nominal bits")
    axes.axhline(full_precision, color="black", linewidth=0.8, label="full precision")
    axes.set(yscale="log", xlabel="true bits a weight", ylabel="WikiText-2 perplexity")
    axes.legend(fontsize="small")
    figure.savefig(folder / "near_binary.png", dpi=150)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", help="text file, a document a row; Python's documentation if left out")
    parser.add_argument("--evaluation", help="text file, a document a row; Python's documentation if left out")
    parser.add_argument("--folder", type=Path, default=Path("runs/near-binary"), help="where the run folders go")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.1, 1.15, 1.25, 1.5], help="true bits")
    parser.add_argument("--windows", default="24", help="evaluation windows of 1,024 tokens")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of run names")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    options, further = parser.parse_known_args()
    chosen = [p for p in points(options.budgets) if any(fnmatch.fnmatchcase(p.name, only) for only in options.only)]
    console = Console(highlight=False)
    if options.list:
        for point in chosen:
            console.print(f"{point.name:20} {point.result:12} {point.scheme}", soft_wrap=True)
        return
    common = texts(options.calibration, options.evaluation)
    common += [f"--evaluation.num_windows={options.windows}", *further]
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for point in chosen:
        arguments = [
            f"--model.scheme={point.scheme}",
            f"--model.warm_start={point.warm_start}",
            f"--model.phases={PHASES[point.result]}",
        ]
        summary = summary_of(options.folder / point.name, [*common, *arguments], point.result)
        rows.append(row_of(point, summary))
        table = write(options.folder, rows, summary["perplexity"]["full_precision"])
    console.print(table, soft_wrap=True)


if __name__ == "__main__":
    main()
