"""What the formats made of ``nn.Linear`` layers have in common: which layers, at how many bits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_gsq.export.source import FinishedRun, QuantizedWeight
from lightning_gsq.scheme import QuantScheme

NARROWEST = 2
"""Bits of the narrowest grid -2^(b-1) ... 2^(b-1) - 1 that holds -1 and +1."""


def linear_bits(scheme: QuantScheme) -> int:
    """Bits of a code in a format whose grids are -2^(b-1) ... 2^(b-1) - 1: 1 bit and ternary take two."""
    return max(NARROWEST, scheme.storage_bits)


def layer_names(run: FinishedRun) -> tuple[list[str], list[str]]:
    """Names of the quantized linear layers of a run's model, and of its other ones."""
    quantized = {weight.stem for weight in run.weights.values()}
    linear = [name for name, module in run.network.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if name in quantized], [name for name in linear if name not in quantized]


def refuse_other_than_linear(format_name: str, weights: Sequence[QuantizedWeight]) -> str | None:
    """Why a format made of linear layers cannot hold these weights; None if it can."""
    for weight in weights:
        if weight.site.experts or weight.site.transposed:
            what = "fuses several experts" if weight.site.experts else "is stored transposed"
            return f"{format_name} holds plain linear layers, and {weight.name} {what}; native and dequantized hold it"
    return None
