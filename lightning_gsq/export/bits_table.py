"""How many bits a weight takes in each file: known from scheme, shape and format alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_gsq.export.contract import ExportFormat
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.export.preflight import weights_obstacle
from lightning_gsq.run.report import megabytes


def print_bits(console: Console, formats: Sequence[ExportFormat], run: PlannedRun, parameters: int) -> None:
    """Prints, for each format, what weights of each scheme take, embedding and head, and all parameters together.

    Args:
        console: Where to print.
        formats: The formats.
        run: The run; its model may be without weights.
        parameters: Parameters of the model, tied ones counted once.
    """
    kinds = _kinds(run)
    table = Table(title="Bits a weight in each file", title_justify="left")
    table.add_column("format", no_wrap=True)
    for column in (*kinds, "file"):
        table.add_column(column)
    refused = []
    for format_ in formats:
        view = format_.view(run)
        reason = weights_obstacle(format_, run)
        if reason is not None:
            table.add_row(format_.name, *("refused" for _ in kinds), "")
            refused.append(f"{format_.name}: {reason}")
            continue
        cells = [_cell(format_, view, weights) for weights in kinds.values()]
        stored = sum(weight.count * format_.stored_bits(weight, view) for weight in view.weights.values())
        rest = parameters - sum(weight.count for weight in view.weights.values())
        total = stored + 8 * format_.other_bytes(view, rest)
        table.add_row(format_.name, *cells, f"about {megabytes(total / 8)}, {total / parameters:.3g} bits a parameter")
    console.print(table)
    for line in refused:
        console.print(line, soft_wrap=True)


def _kinds(run: PlannedRun) -> dict[str, list[ExportedWeight]]:
    """The weights of each scheme in the blocks, then each matrix outside of them."""
    kinds: dict[str, list[ExportedWeight]] = {}
    for weight in run.weights.values():
        outside = "" if weight.block is not None else f"{weight.stem.rpartition('.')[2]}: "
        kinds.setdefault(f"{outside}{weight.scheme}", []).append(weight)
    return kinds


def _cell(format_: ExportFormat, view: PlannedRun, weights: Sequence[ExportedWeight]) -> str:
    """Bits, and the type of the file where it has types; of each where the weights lie in several."""
    if weights[0].name not in view.weights:
        return f"{8 * view.dtype.itemsize}"
    kinds = {}
    for weight in weights:
        kinds[format_.stored_as(weight)] = format_.stored_bits(weight, view)
    return ", ".join(f"{bits:.4g}" + (f" ({name})" if name else "") for name, bits in kinds.items())
