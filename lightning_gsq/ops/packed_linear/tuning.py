"""Tile sizes of the Triton kernels, a table a GPU family, looked up and never searched at call time.

``tuned.json`` is shipped; ``scripts/bench_linear.py --tune`` measures on the GPU at hand and rewrites that GPU's
entries. An entry marked ``"measured": false`` was reasoned out, not measured.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("tuned.json")
FALLBACK = "sm80"
"""Whose entries serve a GPU that has none."""


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel works on.

    Args:
        rows: Rows of the weight.
        units: Units of packed words at a time; at least 16 for more than one token.
        tokens: Tokens; 1 selects the kernel without tensor cores.
        warps: Warps.
    """

    rows: int
    units: int
    tokens: int
    warps: int


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    table: dict[str, dict[str, dict[str, int]]] = json.loads(TABLE.read_text())["tiles"]
    return table


@functools.cache
def family(device: torch.device) -> str:
    """The key of a GPU in the table, such as sm90; the fallback's on a CPU, for the interpreter."""
    if device.type != "cuda":
        return FALLBACK
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def tile_for(device: torch.device, bits: int, tokens: int) -> Tile:
    """The tile for this width and number of tokens."""
    table = _table()
    entries = table.get(family(device), table[FALLBACK])
    if tokens == 1:
        entry = entries.get(f"gemv-{bits}", entries["gemv"])
        return Tile(entry["rows"], entry["units"], 1, entry["warps"])
    width = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    entry = entries.get(f"batch{width}-{bits}", entries.get(f"batch{width}", entries["batch"]))
    return Tile(entry["rows"], entry["units"], width, entry["warps"])
