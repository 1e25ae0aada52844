"""What a run reports: figures of all its weights, and their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_gsq.weights.quantized import BitsLedger, QuantizedWeight

PERPLEXITY_NAMES = {
    "full_precision": "full precision",
    "outer": "with quantized embedding or head alone",
    "warm_start": "after the warm start",
    "blocks": "after the blocks",
    "end_to_end": "after the end-to-end phase",
}


def about_text(about: Mapping[str, Any]) -> str:
    """What a perplexity is one of, in words: :meth:`lightning_gsq.data.PerplexityData.about`."""
    start = ", the first of them BOS" if about["starts_with_bos"] else ""
    return f"{about['text']}, {about['windows']} windows of {about['tokens']:,} tokens{start}, {about['precision']}"


def ledger_of(block: Mapping[str, QuantizedWeight]) -> BitsLedger:
    """The ledger of all weights of a block."""
    return sum((BitsLedger.of(tensor) for tensor in block.values()), BitsLedger())


def saliency_of(prefix: str, block: Mapping[str, QuantizedWeight]) -> dict[str, dict[str, Any]]:
    """What was chosen for each weight of a block that has a salient part, by full parameter name."""
    return {
        f"{prefix}.{name}": {
            **dataclasses.asdict(tensor.scheme.salient),
            "bits_of_others": tensor.scheme.bits,
            "group_size_of_others": tensor.scheme.group_size,
            "true_bits": BitsLedger.of(tensor).per_weight()["total"],
        }
        for name, tensor in block.items()
        if tensor.scheme.salient is not None
    }


def experts_line(experts: Mapping[str, Mapping[str, Any]]) -> str:
    """How many tokens the routed experts of a run saw, and how many keep their start.

    Args:
        experts: By place, as in ``summary.json``.
    """
    parts = [f"{sum(len(next(iter(own.values()))) for own in experts.values())} in {len(experts)} blocks"]
    seen = sorted(count for own in experts.values() for count in own.get("tokens", ()))
    if seen:
        none = seen.count(0)
        parts.append(
            f"{seen[0]:,} to {seen[-1]:,} calibration tokens each, half of them {seen[len(seen) // 2]:,} or more"
            + (f", {none} none" if none else "")
        )
    kept = [len(own["kept_start"]) for own in experts.values() if "kept_start" in own]
    if kept:
        parts.append(f"{sum(kept)} kept their start")
    return "; ".join(parts)


def megabytes(count: float) -> str:
    """A size for people."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 or not count else f"{count / 1e3:,.1f} kB"


def counted(count: int, what: str) -> str:
    """A number of things, in singular or plural."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
