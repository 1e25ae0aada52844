"""Linear layers of other packages over packed codes, for the benchmark: made where their package is installed.

Each takes rows, columns, bits and group size and gives a layer on the current GPU with random content, to be called
with bf16 inputs. A width that a package does not have raises that package's own error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn


def gemlite(rows: int, columns: int, bits: int, group: int) -> nn.Module:
    """Triton kernels of https://github.com/dropbox/gemlite: 1, 2, 4, 8 bits."""
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(bits, group, columns, rows, DType.BF16, DType.BF16)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device="cuda")
    layer.pack(codes, torch.rand(rows, columns // group, dtype=torch.bfloat16, device="cuda"), 2 ** (bits - 1))
    return layer


def humming(rows: int, columns: int, bits: int, group: int) -> nn.Module:
    """Kernels of https://github.com/vllm-project/humming, compiled when first used: 1 to 8 bits."""
    from humming.layer import HummingLayer

    config = {"dtype": f"int{bits}", "group_size": group}
    layer = HummingLayer(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda"))
    layer.transform()
    return layer


PEERS: dict[str, Callable[[int, int, int, int], nn.Module]] = {"gemlite": gemlite, "humming": humming}
"""By the name that their package is imported by."""


def installed() -> list[str]:
    """The packages that are there."""
    return [name for name in PEERS if importlib.util.find_spec(name) is not None]
