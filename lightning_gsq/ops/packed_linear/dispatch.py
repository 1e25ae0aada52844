"""Which form of the packed linear layer runs, by device and number of tokens: the one table.

| form      | what it does                                                                          | file           |
|-----------|---------------------------------------------------------------------------------------|----------------|
| gemv      | Triton, a token at a time, fp32 sums                                                  | `kernels.py`   |
| batch     | Triton, tensor cores, the weight unpacked in registers                                | `kernels.py`   |
| cpu       | the C++ library, the weight unpacked in registers                                     | `cpu.py`       |
| dense     | the weight made dense, on a CPU some rows at a time, and PyTorch's matrix product     | here           |
| reference | the specification                                                                     | `reference.py` |
"""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_gsq.ops.packed_linear import cpu
from lightning_gsq.ops.packed_linear.reference import dequantize_packed_reference, packed_linear_reference
from lightning_gsq.system.compiling import compiler_available

Form = Literal["gemv", "batch", "cpu", "dense", "reference"]

CHOICES: dict[str, tuple[tuple[float, Form], ...]] = {
    "cuda": ((1, "gemv"), (64, "batch"), (math.inf, "dense")),
    "cpu": ((cpu.MOST_TOKENS, "cpu"), (math.inf, "dense")),
}
"""For each device the forms and the most tokens that each is meant for; other devices take the dense form."""
PANEL_ELEMENTS = 1 << 21
"""Weights that the dense form unpacks at once on a CPU, so that they are still in the cache when they are used."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_log = logging.getLogger(__name__)
_said: set[str] = set()


def choose(x: Tensor, bits: int, group_length: int) -> Form:
    """The form for this input: the table's, or the dense one where that form cannot run."""
    if x.dtype not in _FLOATS:
        return "reference"
    in_features, device = x.shape[-1], x.device.type
    tokens = x.numel() // max(1, in_features)
    form: Form = next((form for most, form in CHOICES.get(device, ()) if tokens <= most), "dense")
    if form in ("gemv", "batch", "cpu") and not cpu.supports(in_features, group_length):
        _say(
            f"groups of {group_length} weights, no multiple of 32, have no fast form: "
            "the weight is made dense for every product"
        )
        return "dense"
    if form in ("gemv", "batch") and not compiler_available("cuda"):
        _say("Triton is not available: the weight is made dense for every product")
        return "dense"
    if form == "cpu" and cpu.library(bits) is None:
        return "dense"
    return form


def run(
    form: Form, x: Tensor, words_OW: Tensor, scales_OG: Tensor, bias_O: Tensor | None, bits: int, group_length: int
) -> Tensor:
    """``x w^T + bias`` by this form."""
    if form == "reference":
        return packed_linear_reference(
            x, words_OW, scales_OG, bias_O, bits=bits, in_features=x.shape[-1], group_length=group_length
        )
    x_TI = x.reshape(-1, x.shape[-1])
    if form == "dense":
        y_TO = _dense(x_TI, words_OW, scales_OG, bits, group_length)
    elif form == "cpu":
        y_TO = cpu.linear(x_TI, words_OW, scales_OG, bits=bits, group_length=group_length)
    else:
        from lightning_gsq.ops.packed_linear import kernels
        from lightning_gsq.ops.packed_linear.tuning import tile_for

        tile = tile_for(x.device, bits, 1 if form == "gemv" else max(2, len(x_TI)))
        y_TO = kernels.linear(x_TI, words_OW, scales_OG, bias_O, bits=bits, group_length=group_length, tile=tile)
        return y_TO.view(*x.shape[:-1], -1)
    if bias_O is not None:
        y_TO = y_TO + bias_O.to(y_TO.dtype)
    return y_TO.to(x.dtype).view(*x.shape[:-1], -1)


def dequantize(
    words_OW: Tensor, scales_OG: Tensor, *, bits: int, in_features: int, group_length: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight ``O I`` by the fastest form there is."""
    device = words_OW.device.type
    settings = {"bits": bits, "in_features": in_features, "group_length": group_length, "dtype": dtype}
    if dtype in _FLOATS and scales_OG.dtype in _FLOATS:
        if device == "cuda" and compiler_available("cuda"):
            from lightning_gsq.ops.packed_linear import kernels

            return kernels.dequantize(words_OW, scales_OG, **settings)  # type: ignore[arg-type]
        if device == "cpu" and cpu.library(bits) is not None:
            return cpu.dequantize(words_OW, scales_OG, **settings)  # type: ignore[arg-type]
    return dequantize_packed_reference(words_OW, scales_OG, **settings)  # type: ignore[arg-type]


def _dense(x_TI: Tensor, words_OW: Tensor, scales_OG: Tensor, bits: int, group_length: int) -> Tensor:
    (rows, _), in_features = words_OW.shape, x_TI.shape[1]
    panel = max(16, PANEL_ELEMENTS // in_features) if x_TI.device.type == "cpu" else rows
    parts = []
    for start in range(0, rows, panel):
        words, scales = words_OW[start : start + panel], scales_OG[start : start + panel]
        w_OI = dequantize(
            words, scales, bits=bits, in_features=in_features, group_length=group_length, dtype=x_TI.dtype
        )
        parts.append(nn.functional.linear(x_TI, w_OI))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _say(message: str) -> None:
    """A warning, once."""
    if message not in _said:
        _said.add(message)
        _log.warning(message)
