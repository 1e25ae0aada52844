"""What a run found, as ``summary.json`` holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_gsq.models import loading
from lightning_gsq.run import report
from lightning_gsq.run.block_files import OUTER, Blocks
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.outer_weights import outer_kind
from lightning_gsq.run.run import Run
from lightning_gsq.system.memory import peak_memory_bytes
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.ledger import Ledger, LedgerEntry
from lightning_gsq.weights.quantized import BitsLedger, QuantizedWeight


@dataclass
class _Counted:
    """Figures of the quantized weights, which are looked at once, one block after another.

    Args:
        ledger: Bits of their files, and of everything else in the dtype of the saved model.
        bits: Bits of those in the blocks.
        saliency: What was chosen for those in the blocks that have a salient part.
    """

    ledger: Ledger
    bits: BitsLedger
    saliency: dict[str, dict[str, Any]]


def _count(
    model: ModelQuantization,
    plan: list[BlockPlan],
    tensors: Sequence[Blocks],
    outer: Blocks,
    folder: RunFolder,
    kind: str,
) -> _Counted:
    entries, headers, bits = list[LedgerEntry](), dict[str, int](), BitsLedger()
    saliency: dict[str, dict[str, Any]] = {}

    def add(file: Path, named: Mapping[str, QuantizedWeight]) -> None:
        stored = [LedgerEntry.of(name, tensor) for name, tensor in named.items()]
        entries.extend(stored)
        headers[file.name] = file.stat().st_size - sum(entry.bits for entry in stored) // 8

    for block, weights in zip(plan, tensors, strict=True):
        add(folder.block_file(kind, block.index), {f"{block.name}.{name}": t for name, t in weights.items()})
        bits += report.ledger_of(weights)
        saliency |= report.saliency_of(block.name, weights)
    if outer:
        add(folder.block_file(outer_kind(kind), OUTER), outer)
    quantized = {entry.name for entry in entries}
    entries += [
        LedgerEntry(name, p.numel(), unquantized=8 * model.storage.output_dtype.itemsize * p.numel())
        for name, p in model.network.named_parameters()
        if name not in quantized
    ]
    return _Counted(Ledger(tuple(entries), headers), bits, saliency)


def _about(tensor: QuantizedWeight) -> dict[str, Any]:
    """What a weight outside of the blocks is and costs."""
    return {
        "scheme": str(tensor.scheme),
        "bits_per_weight": BitsLedger.of(tensor).per_weight()["total"],
        "bytes": sum(part.nbytes for part in tensor.pack().values()),
    }


def _seconds_of_block(
    blocks: Mapping[str, Mapping[str, Any]], init_seconds: Mapping[str, float], planned: int
) -> dict[str, dict[str, float]]:
    """Mean seconds a block of each part of the work, by phase, under the names that the pipeline gives the parts."""
    prefix = "seconds/"
    parts = sorted({key for block in blocks.values() for key in block if key.startswith(prefix)})
    return {
        "init": {part: seconds / planned for part, seconds in init_seconds.items()},
        "blocks": {
            key.removeprefix(prefix): sum(block.get(key, 0.0) for block in blocks.values()) / len(blocks)
            for key in parts
        },
    }


def _experts(plan: Sequence[BlockPlan], folder: RunFolder, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What was counted of the routed experts of each place, by its full name: tokens, and which keep their start."""
    found: dict[str, dict[str, Any]] = {}
    for block in plan:
        headers = [folder.header(kind, block.index) for kind in kinds]
        measures = next((header.measures for header in headers if header is not None), {})
        found |= {f"{block.name}.{place}": counts for place, counts in measures.get("experts", {}).items()}
    return found


def make_summary(
    run: Run,
    source: loading.ModelSource,
    kind: str,
    tensors: Sequence[Blocks],
    outer: Blocks,
    perplexity: dict[str, float],
    end_to_end: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        run: The run; outside of its blocks, its model has the weights of the result.
        source: Where the model came from.
        kind: Whose result stands: that of the warm start, the blocks or the end-to-end phase.
        tensors: Its codes and scales, by planned block; each is asked for once.
        outer: Quantized weights outside of the blocks, by name in the model.
        perplexity: The perplexities, by name.
        end_to_end: The end-to-end phase's report, if it ran.
    """
    model, folder, plan = run.model, run.folder, run.plan
    counted = _count(model, plan, tensors, outer, folder, kind)
    progress, blocks = folder.progress, folder.measures()
    experts = _experts(plan, folder, ["warm_start"] if kind == "warm_start" else ["block", "warm_start"])
    for block in blocks.values():
        block.pop("experts", None)  # they are told by place
    seconds_of = {**progress.get("seconds", {}), "blocks": sum(block["seconds"] for block in blocks.values())}
    parameters = sum(p.numel() for p in model.network.parameters())
    files = sum(folder.block_file(kind, block.index).stat().st_size for block in plan)
    peak = max(progress.get("peak_memory_bytes", 0), peak_memory_bytes())
    folder.update_progress(peak_memory_bytes=peak)
    summary = {
        "perplexity": perplexity,
        "bits_per_weight": counted.bits.per_weight(),
        "ledger": counted.ledger.summary(),
        "bytes": {
            "original": loading.num_bytes(source, model.network),
            "dense": 2 * parameters,
            "quantized": counted.ledger.num_bytes,
            "blocks": files,
            **({"outer": folder.block_file(outer_kind(kind), OUTER).stat().st_size} if outer else {}),
        },
        **({"outer": {name: _about(tensor) for name, tensor in outer.items()}} if outer else {}),
        "seconds_per_block": seconds_of["blocks"] / max(1, len(blocks)),
        "seconds_of_block": _seconds_of_block(blocks, progress.get("init_seconds", {}), len(plan)),
        "seconds_of": seconds_of,
        "peak_memory_bytes": peak,
        "scheme": {
            "name": str(model.selection),
            "bits": model.selection.scheme.bits,
            "group_size": model.selection.scheme.group_size,
        },
        "blocks": blocks,
        **({"saliency": counted.saliency} if counted.saliency else {}),
        **({"experts": experts} if experts else {}),
        "pretrained": model.address.pretrained,
        "seed": run.seed,
        "versions": run.recipe["versions"],
        "torch_threads": torch.get_num_threads(),
    }
    if end_to_end is not None:
        summary["end_to_end"] = end_to_end
        seconds_of["end_to_end"] = end_to_end["seconds"]
    return {**summary, "seconds": sum(seconds_of.values())}
