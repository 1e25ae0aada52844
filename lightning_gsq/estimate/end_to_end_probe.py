"""How long the end-to-end phase will take, from a batch through one block and through some rows of the head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate.probe import random_block
from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.simulate import longer
from lightning_gsq.estimate.skeleton import Skeleton
from lightning_gsq.estimate.timing import median_seconds
from lightning_gsq.models.chain import run_block
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.ops.distillation import Head, HiddenTarget, distillation_loss
from lightning_gsq.training import EndToEndOptions
from lightning_gsq.weights.quantized import expand_groups

GROUP = 64
"""Weights a scale; other groups take about the same time."""
ROWS, POSITIONS = 8192, 512
"""Tokens of the vocabulary, and positions, that the loss is tried on."""


@dataclass(frozen=True)
class EndToEndTiming:
    """Seconds of a batch's parts.

    Args:
        forward: Through one block as it is.
        trained: Through a block whose scales train, there and back.
        measured: The loss of a batch from the last hidden states of both models.
        head: The same with its gradient.
    """

    forward: float
    trained: float
    measured: float
    head: float

    def work(
        self, options: EndToEndOptions, data: CalibrationDataModule, blocks: int, world: int, several: int
    ) -> EndToEndWork:
        """What the phase takes.

        Args:
            options: Those of the phase.
            data: Says how many sequences there are.
            blocks: Blocks of the model.
            world: Devices that share the sequences.
            several: Batches of an optimizer step.
        """
        passes = options.passes
        a_pass = max(1, data.num_sequences // (passes.batch_size * world))
        batches = passes.max_epochs * a_pass
        if passes.max_steps >= 0:
            batches = min(batches, passes.max_steps * several)
        # The teacher, the student, and the student again where its activations are not kept.
        a_batch = blocks * ((1 + options.recompute) * self.forward + self.trained) + self.head
        evaluations = 1 + max(1, round(passes.validations * batches / a_pass))
        held_out = math.ceil(data.num_validation_sequences / (passes.batch_size * world))
        # What the teacher says of held-out text is kept, unless the model is spread over processes.
        of_teacher = evaluations if options.strategy is not None and world > 1 else 1
        of_models = (of_teacher + evaluations) * blocks * self.forward
        seconds = batches * a_batch + held_out * (of_models + evaluations * self.measured)
        return EndToEndWork(math.ceil(batches / several), several * a_batch, seconds)


@dataclass(frozen=True)
class EndToEndWork:
    """What the end-to-end phase takes.

    Args:
        steps: Optimizer steps.
        a_step: Seconds of one.
        seconds: Of the phase, evaluations included.
    """

    steps: int
    a_step: float
    seconds: float


def end_to_end_work(
    options: EndToEndOptions,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    plan: dict[int, Weights],
    trainer: Trainer,
) -> EndToEndWork:
    """Tries a batch of the phase, and says what all of it takes.

    Args:
        options: Those of the phase.
        data: Says how many sequences there are, and how long.
        skeleton: The model without its weights.
        plan: The weights of each block that are quantized; the first such block is tried.
        trainer: Has the devices, the precision, and what the phase leaves to it.
    """
    device, bf16 = trainer.strategy.root_device, trainer.precision == "bf16-mixed"
    timing = _timing(options, data, skeleton, *next(iter(plan.items())), device, bf16)
    several = options.passes.accumulate_grad_batches or trainer.accumulate_grad_batches
    return timing.work(options, data, len(skeleton.blocks), trainer.world_size, several)


def _timing(
    options: EndToEndOptions,
    data: CalibrationDataModule,
    skeleton: Skeleton,
    index: int,
    weights: Weights,
    device: torch.device,
    bf16: bool,
) -> EndToEndTiming:
    size, tokens = options.passes.batch_size, data.sequence_length
    own = skeleton.blocks[index]
    block = random_block(own, device).requires_grad_(False)
    call = longer(own.call, tokens).to(device)
    hidden_BTD = torch.randn(size, tokens, skeleton.width, device=device, requires_grad=True)
    codes = {site: torch.ones(site.rows, site.in_features, dtype=torch.int8, device=device) for site in weights}
    scales = {site: _scales(site, device) for site in weights}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def forward(_: int) -> None:
        with torch.no_grad(), autocast:
            run_block(block, hidden_BTD, call)

    def trained(_: int) -> None:
        with autocast:
            dense = {
                site.name: site.from_matrix(codes[site] * expand_groups(scales[site], site.in_features, GROUP))
                for site in weights
            }
            total = run_block(block, hidden_BTD, call, dense).float().sum()
        torch.autograd.grad(total, [hidden_BTD, *scales.values()], allow_unused=True)

    rows, positions = min(ROWS, skeleton.vocabulary), min(POSITIONS, size * tokens)
    whole = skeleton.vocabulary / rows * size * tokens / positions
    head = Head(torch.randn(rows, skeleton.width, device=device))
    last_ND = torch.randn(positions, skeleton.width, device=device, requires_grad=True)
    labels_N = torch.zeros(positions, dtype=torch.int64, device=device)

    def loss() -> Tensor:
        with autocast:
            target = HiddenTarget(last_ND.detach(), head)
            return distillation_loss(last_ND, head, target, labels_N, chunk=options.loss.chunk)[0]

    def measured(_: int) -> None:
        with torch.no_grad():
            loss()

    def learned(_: int) -> None:
        torch.autograd.grad(loss(), last_ND)

    return EndToEndTiming(
        median_seconds(forward, device),
        median_seconds(trained, device),
        whole * median_seconds(measured, device),
        whole * median_seconds(learned, device),
    )


def _scales(site: LinearSite, device: torch.device) -> Tensor:
    groups = math.ceil(site.in_features / GROUP)
    return torch.full((site.rows, groups), 0.02, device=device, requires_grad=True)
