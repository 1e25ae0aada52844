"""The ledger as a figure: where the bytes go, over the whole model and block by block."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

from lightning_gsq.weights.ledger import PARTS, Ledger

REST = "other"
MEGABYTE = 1e6


def draw_ledger(ledger: Ledger, file: Path) -> None:
    """Draws the ledger into a PNG file."""
    groups: dict[str, dict[str, float]] = {}
    for entry in ledger.entries:
        group = groups.setdefault(_group(entry.name), dict.fromkeys(PARTS, 0.0))
        for part in PARTS:
            group[part] += getattr(entry, part) / 8 / MEGABYTE
    parts = [part for part in PARTS if ledger.total(part)]
    names = sorted(groups, key=lambda name: (name == REST, int(name) if name != REST else 0))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    whole, blocks = figure.subplots(1, 2, width_ratios=[1, 3])
    sums = {part: ledger.total(part) / 8 / MEGABYTE for part in parts}
    sums["headers"] = sum(ledger.headers.values()) / MEGABYTE
    bottom = 0.0
    for number, (part, size) in enumerate(sums.items()):
        whole.bar(0, size, bottom=bottom, color=f"C{number}", label=f"{part} {size:,.2f} MB")
        bottom += size
    whole.set_xticks([])
    whole.set_ylabel("MB")
    whole.set_title(f"{ledger.num_bytes:,} bytes", fontsize="medium")
    positions = range(len(names))
    bottoms = [0.0] * len(names)
    for number, part in enumerate(parts):
        sizes = [groups[name][part] for name in names]
        blocks.bar(positions, sizes, bottom=bottoms, color=f"C{number}", label=f"{part} {sums[part]:,.2f} MB")
        bottoms = [low + size for low, size in zip(bottoms, sizes, strict=True)]
    blocks.bar([], [], color=f"C{len(parts)}", label=f"headers {sums['headers']:,.2f} MB")
    step = max(1, len(names) // 12)
    shown = [i for i in positions if (i % step == 0 and names[i] != REST) or i == len(names) - 1]
    blocks.set_xticks(shown, [names[i] for i in shown])
    blocks.set_xlabel("block (other: embedding, last norm, head)")
    blocks.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def _group(name: str) -> str:
    """The number of the block that a parameter belongs to; ``other`` outside of the blocks."""
    number = re.search(r"\.(\d+)\.", name)
    return number[1] if number else REST
