"""Quantized weights of every kind, random or rounded."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import LinearSite, find_linear_sites
from lightning_gsq.quantizers import RTN
from lightning_gsq.quantizers.salient_start import mixed_tensor
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.weights.mixed import MixedTensor
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme

Weights = dict[int, dict[LinearSite, QuantizedTensor]]


def rounded(network: PreTrainedModel, bits: int = 2) -> Weights:
    """Every block's weights, rounded to nearest."""
    scheme = QuantScheme(bits, 16)
    traced = trace(network, torch.arange(8)[None])
    found: Weights = {}
    for index, block in enumerate(find_blocks(network)[1]):
        sites = find_linear_sites(block, lambda b=block, i=index: run_block(b, traced.inputs_BTD[i], traced.calls[i]))
        starts = {site: RTN()(site.to_matrix(block.get_parameter(site.name)), None, scheme) for site in sites}
        found[index] = {site: quantized(start, scheme, torch.float16) for site, start in starts.items()}
    return found


def random_tensor(bits: object, group_size: int, columns: int, rows: int = 6) -> QuantizedTensor:
    """Random codes and fp16 scales."""
    scheme = QuantScheme(bits, group_size)  # type: ignore[arg-type]
    codes = torch.tensor(scheme.grid.levels, dtype=torch.int8)[torch.randint(len(scheme.grid.levels), (rows, columns))]
    return QuantizedTensor(codes, torch.randn(rows, scheme.num_groups(columns)).half(), scheme)


def mixed_case(bits: object, salient_bits: int, columns: int, count: int, table: int | None) -> MixedTensor:
    """Random codes and scales of five rows, ``count`` of their columns salient."""
    part = SalientPart("structured", salient_bits, count / columns, scale_groups=table)
    scheme = QuantScheme(bits, 8, part)  # type: ignore[arg-type]
    columns_K = torch.randperm(columns)[:count].sort().values

    def coded(own: QuantScheme, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.tensor(own.grid.levels, dtype=torch.int8)[torch.randint(len(own.grid.levels), (5, width))]
        return codes, torch.rand(5, own.num_groups(width)) + 0.1

    salient = coded(scheme.salient_scheme, count) if count else None
    return mixed_tensor(columns_K, coded(scheme.plain, columns - count), salient, scheme, torch.float16)
