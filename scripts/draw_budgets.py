"""Perplexity over minutes, a line a tool: draws ``docs/figures/budgets.png`` from ``budgets.csv`` beside it.

    python scripts/draw_budgets.py

A row is one measured run: bits a weight, tool, minutes, perplexity (WikiText-2, 24 windows of 1,024 tokens), what ran.
The logarithmic axis shows the distance to full precision.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no display

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
FULL_PRECISION = 23.53
TICKS = (24, 25, 26, 27, 28, 30, 35, 50, 75, 100, 150)
COLOURS = {
    "AutoRound": "#888888",
    "GSQ with blocks": "#1f77b4",
    "GSQ least squares": "#d62728",
    "GSQ least squares, following": "#2ca02c",
    "the same, chosen widths": "#9467bd",
}


def main() -> None:
    with (FOLDER / "budgets.csv").open() as file:
        rows = list(csv.DictReader(file))
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    figure = Figure(figsize=(4.2 * len(widths), 3.6), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False)[0]
    for axis, bits in zip(axes, widths, strict=True):
        for tool, colour in COLOURS.items():
            points = sorted(
                (float(row["minutes"]), float(row["perplexity"]))
                for row in rows
                if row["bits"] == bits and row["tool"] == tool
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=tool)
        axis.axhline(FULL_PRECISION, color="black", linewidth=0.8, linestyle=":")
        axis.annotate("full precision", (0, FULL_PRECISION), xytext=(4, 3), textcoords="offset points", fontsize=8)
        axis.set(title=f"{bits} bits", xlabel="minutes on two cores", yscale="log", xlim=(0, 1.05 * axis.dataLim.x1))
        low, high = axis.get_ylim()
        ticks = [tick for tick in TICKS if low < tick < 1.1 * high and (high < 30 or tick % 5 == 0)]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity, WikiText-2")
    axes[-1].legend(fontsize=8)
    figure.savefig(FOLDER / "budgets.png", dpi=120)


if __name__ == "__main__":
    main()
