"""The widths of a model as a picture: bits of each matrix over depth, and where the bytes go."""

from __future__ import annotations

import re
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

MEGABYTE = 1e6
_BLOCK = re.compile(r"\.(\d+)\.")


def draw_widths(parts: Mapping[str, tuple[int, float]], rest: float = 0.0) -> Figure:
    """Draws them.

    Args:
        parts: Weights and bytes of each matrix, by parameter name.
        rest: Bytes of everything else in the file.
    """
    kinds: dict[str, dict[int, tuple[int, float]]] = {}
    outside: dict[str, tuple[int, float]] = {}
    for name, (weights, size) in parts.items():
        block = _BLOCK.search(name)
        if block is None:
            outside[_short(name)] = (weights, size)
            continue
        of_block = kinds.setdefault(_short(_BLOCK.sub(".*.", name[block.end() :])), {})
        before = of_block.get(int(block[1]), (0, 0.0))  # experts of a list are one row
        of_block[int(block[1])] = (before[0] + weights, before[1] + size)
    names, depth = list(kinds), 1 + max((index for sizes in kinds.values() for index in sizes), default=0)
    bits = np.full((len(names), depth), np.nan)
    for row, name in enumerate(names):
        for index, (weights, size) in kinds[name].items():
            bits[row, index] = 8 * size / weights
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(names)), layout="constrained")
    map_, bar = figure.subplots(1, 2, width_ratios=[3, 1])
    image = map_.imshow(bits, aspect="auto", cmap=matplotlib.colormaps["viridis"], interpolation="nearest")
    map_.set_yticks(range(len(names)), names, fontsize="small")
    map_.set_xlabel("block")
    figure.colorbar(image, ax=map_, label="bits a weight")
    sums = {name: sum(size for _, size in sizes.values()) for name, sizes in kinds.items()}
    sums |= {name: size for name, (_, size) in outside.items()} | ({"rest": rest} if rest else {})
    bottom = 0.0
    for number, (name, size) in enumerate(sums.items()):
        label = f"{name} {size / MEGABYTE:,.2f} MB"
        if name in outside:
            label += f", {8 * size / outside[name][0]:.2f} bits"
        bar.bar(0, size / MEGABYTE, bottom=bottom, color=f"C{number % 10}", label=label)
        bottom += size / MEGABYTE
    bar.set_xticks([])
    bar.set_ylabel("MB")
    bar.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _short(name: str) -> str:
    """The end of a name that tells matrices of one block apart."""
    return ".".join(name.removesuffix(".weight").split(".")[-2:]).removeprefix("model.")
