"""Sizes that several phases of a run share, each a product of what the configuration and the model's structure say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import GumbelOptions
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.saliency.budget import planned_ledger
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.quantized import BitsLedger, stored_scale_bits
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.weights.vector_grid import VectorGrid

Weights = dict[LinearSite, QuantScheme]
"""The weights of a block that are quantized, with their schemes."""


@dataclass(frozen=True)
class Surroundings:
    """What this machine and the settings add to the model's sizes.

    Args:
        bf16: Matrix products in bfloat16.
        optimizer_state: Bytes of optimizer state for each byte of parameters.
        file_bytes: Size of a GGUF file, which is mapped while the model loads; 0 for safetensors.
        device_room: Bytes of the accelerator; None if the device is the host or does not say.
        accelerated: The device has a memory of its own.
        mapped: The model's weights are a mapping of their files, which the system can drop and read again.
        output_dtype: Dtype of the saved model.
        host_room: Bytes of the host; None for one that has room for everything.
        spread: Devices that share the model in the end-to-end phase; 1 for a copy on each.
        experts_over: Devices that share the experts of a block; 1 where each has all of them.
        accumulates: The gradients of several batches add up to a step.
        choices: Presets that a matrix may take where a size is given; 0 without one.
    """

    bf16: bool
    optimizer_state: float
    file_bytes: int
    device_room: int | None
    accelerated: bool
    mapped: bool
    output_dtype: torch.dtype = torch.bfloat16
    host_room: int | None = None
    spread: int = 1
    experts_over: int = 1
    accumulates: bool = False
    choices: int = 0


def stream_bytes(data: CalibrationDataModule, options: ActivationOptions, width: int) -> int:
    """Hidden states of all sequences at one depth."""
    return data.wanted * data.sequence_length * width * options.itemsize


def num_streams(model: ModelQuantization) -> int:
    """How many of them the blocks phase holds."""
    return model.block.target.streams


def window_bytes(evaluation: PerplexityData, options: ActivationOptions, width: int) -> int:
    """Hidden states of the evaluation windows at one depth; of one window where their number depends on the text."""
    count = evaluation.num_windows or 1
    return count * evaluation.sequence_length * width * getattr(torch, options.dtype).itemsize


def num_logits(weights: Iterable[tuple[LinearSite, QuantScheme]], options: GumbelOptions) -> int:
    """Logits of these weights."""
    counts = (
        site.rows * site.in_features * scheme.grid.logits_per_weight(options.shifts, options.vectors)
        for site, scheme in weights
    )
    return round(sum(counts))


def candidate_bytes(weights: Iterable[tuple[LinearSite, QuantScheme]], options: GumbelOptions) -> int:
    """Bytes of the code vectors that these weights choose from, int8."""
    return options.vectors * sum(
        site.rows * site.in_features for site, scheme in weights if isinstance(scheme.grid, VectorGrid)
    )


def optimizer_state(model: ModelQuantization) -> float:
    """Bytes of state for each byte of parameters, found by one step of the user's optimizer on a small tensor."""
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype=getattr(torch, model.block.gumbel.logits_dtype)))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = model.block.optimizer([{"params": [parameter], "name": "logits"}])
    optimizer.step()
    state = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    return sum(value.nbytes for value in state) / parameter.nbytes


def outer_ledgers(model: ModelQuantization, network: PreTrainedModel) -> dict[str, tuple[QuantScheme, BitsLedger]]:
    """Scheme and bits of a quantized embedding and head, by parameter name."""
    scale_dtype = model.storage.scale_dtype
    return {
        name: (scheme, ledger_of([(LinearSite(name, 0, rows, columns, transposed=False), scheme)], scale_dtype))
        for name, (scheme, (rows, columns)) in model.outer.expected(network).items()
    }


def ledger_of(weights: Iterable[tuple[LinearSite, QuantScheme]], scale_dtype: torch.dtype) -> BitsLedger:
    """What quantized weights will cost, without quantizing them."""
    total = BitsLedger()
    for site, scheme in weights:
        if scheme.mixed:
            total += planned_ledger(site.rows, site.in_features, scheme, scale_dtype)
            continue
        words = site.rows * sum(scheme.grid.words(site.in_features).values())
        scales = stored_scale_bits(scheme, site.rows, site.in_features, 8 * scale_dtype.itemsize)
        total += BitsLedger(site.rows * site.in_features, 32 * words, scales)
    return total


def scale_numbers(weights: Iterable[tuple[LinearSite, QuantScheme]]) -> int:
    """Numbers that are stored, and train, as the scales of these weights."""
    return sum(site.rows * part.columns for site, scheme in weights for part in scheme.parts(site.in_features).values())
