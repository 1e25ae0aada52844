"""What ``plan`` does: what ``fit`` would take, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console

from lightning_gsq.commands.menu import Free
from lightning_gsq.commands.sizing_before import assume, choose_before, has_weights
from lightning_gsq.commands.tables import print_estimate
from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.estimate import Estimate, estimate, limits
from lightning_gsq.export import PlannedRun
from lightning_gsq.export.bits_table import print_bits
from lightning_gsq.export.registry import all_formats
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.training import EndToEndOptions, ModelQuantization

OWN = {"probe", "host_memory_gb", "device_memory_gb"}
"""Options that ``fit`` has not."""


def plan(
    model: ModelQuantization,
    data: CalibrationDataModule,
    evaluation: PerplexityData,
    activations: ActivationOptions,
    end_to_end: EndToEndOptions,
    trainer: Trainer,
    settings: dict[str, Any],
    seed: int,
    formats: Sequence[str],
    console: Console,
    probe: bool = True,
    host_memory_gb: float | None = None,
    device_memory_gb: float | None = None,
) -> Estimate:
    """Says what ``fit`` would take with the same options: sizes, memory, disk, steps, time; and what each file would.

    With a size, the widths that the run would take are chosen first: the model is loaded for that. Of a model without
    weights, the widest choice that fits for all is planned with.

    Args:
        model: The model, not loaded, and its settings.
        data: Calibration text.
        evaluation: Text for perplexity.
        activations: How hidden states are kept.
        end_to_end: The end-to-end phase.
        trainer: A Trainer with the user's settings.
        settings: All resolved settings.
        seed: Seed of everything random.
        formats: Formats that the run would be exported to.
        console: Where to print.
        probe: Measure a few steps on one block of random weights, for an estimate of the time.
        host_memory_gb: Plan for a machine with this much memory, in gigabytes (10^9 bytes); null for this one.
        device_memory_gb: Plan for an accelerator with this much memory; null for this machine's.

    Raises:
        ConfigurationError: it does not fit.
    """
    settings, loaded = {name: value for name, value in settings.items() if name not in OWN}, False
    choices: Free = {}
    if model.size is not None and has_weights(model):
        choices = choose_before(model, data, evaluation, activations, trainer, settings, seed, formats, console)
        loaded = True
    elif model.size is not None:
        choices = assume(model, settings, formats, console)
    host, device = (None if gb is None else gb * 1e9 for gb in (host_memory_gb, device_memory_gb))
    planned = estimate(model, data, evaluation, activations, end_to_end, trainer, probe, host, device, choices)
    print_estimate(console, planned, data, model.address.pretrained, loaded)
    print_bits(console, list(all_formats().values()), _exported(model, planned), planned.skeleton.parameters)
    left = model.outer.left(planned.skeleton.model)
    if left is not None:
        console.print(left, soft_wrap=True)
    limits.refuse(planned.problems)
    return planned


def _exported(model: ModelQuantization, planned: Estimate) -> PlannedRun:
    """The run as the formats see it; its model has no weights."""
    model.network = planned.skeleton.model
    prefix = planned.skeleton.prefix
    blocks = [BlockPlan(index, f"{prefix}.{index}", weights) for index, weights in planned.plan.items()]
    return PlannedRun(model, blocks, {})
