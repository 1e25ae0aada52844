"""How long a run will take, from a few steps on one block of random weights on this machine."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.estimate import start_probe
from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.simulate import longer
from lightning_gsq.estimate.skeleton import BlockSkeleton
from lightning_gsq.estimate.timing import median_seconds
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import BlockRunner
from lightning_gsq.quantizers import Start
from lightning_gsq.quantizers.vector_gumbel import quantizer_of
from lightning_gsq.run.forward_passes import sequences_at_once
from lightning_gsq.system.seeding import generator_of
from lightning_gsq.training import BlockQuantization, ModelQuantization
from lightning_gsq.weights.layout import SCALES

WATCHED = 2**36
"""Tokens times parameters of a block: watching more of them says no more of the time, and takes minutes."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one block's parts.

    Args:
        step: One training step of one batch; None where blocks do not train.
        forward: One forward pass of one batch, without gradients.
        watched: Summing up what the start has to know of one sequence, passes included.
        rounding: The warm start of all its weights.
    """

    step: float | None
    forward: float
    watched: float
    rounding: float

    def block(self, model: ModelQuantization, data: CalibrationDataModule, steps: int) -> float:
        """Seconds of a block in the blocks phase."""
        batches = data.wanted / data.batch_size
        # Both streams (or the target alone, for "local") and more text for experts; validation: two passes at the end
        # of every epoch, two more over the finished block.
        further = 2 * model.start.experts.extra_sequences + 4 * data.num_validation_sequences
        passes = 2 * batches + further / data.batch_size
        return steps * (self.step or 0.0) + passes * self.forward + self._statistics(model, data) + self.rounding

    def end_loss(self, model: ModelQuantization, data: CalibrationDataModule) -> float:
        """Seconds of a block in the passes that weigh tokens: forwards, and forwards and back."""
        return 4 * model.start.end_loss_weights * model.start.hessian_sequences / data.batch_size * self.forward

    def warm_start(self, model: ModelQuantization, data: CalibrationDataModule) -> float:
        """Seconds of a block in the warm-start phase."""
        propagated = (1 + model.follows) * _looked_at(model) + 2 * model.start.experts.extra_sequences
        return propagated / data.batch_size * self.forward + self._statistics(model, data) + self.rounding

    def _statistics(self, model: ModelQuantization, data: CalibrationDataModule) -> float:
        return _looked_at(model) * self.watched


def _looked_at(model: ModelQuantization) -> int:
    """Sequences that the start sees."""
    return model.start.hessian_sequences if model.start.watches_inputs else 0


def probe(
    model: ModelQuantization,
    data: CalibrationDataModule,
    width: int,
    block: BlockSkeleton,
    weights: Weights,
    device: torch.device,
    bf16: bool,
    run: BlockRunner,
) -> Timing:
    """Times one block of this shape with random weights."""
    full = random_block(block, device)
    call = longer(block.call, data.sequence_length).to(device)
    batch = tuple(torch.randn(data.batch_size, data.sequence_length, width, device=device) for _ in range(2))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def forward(_: int) -> None:
        with torch.no_grad(), autocast:
            run(full, batch[0], call)

    enough = WATCHED // (block.parameters * data.sequence_length)
    together = max(1, min(sequences_at_once(data.sequence_length), _looked_at(model), enough))
    several = torch.randn(together, data.sequence_length, width, device=device)
    watch = start_probe.watching(model, full, weights, several, call, autocast)
    return Timing(
        step=_step(model, full, call, weights, batch, autocast, run) if "blocks" in model.phases else None,
        forward=median_seconds(forward, device),
        watched=0.0 if watch is None else median_seconds(watch, device, repeats=1) / together,
        rounding=start_probe.rounding(model, weights, device),
    )


def random_block(block: BlockSkeleton, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A block with random weights."""

    def random(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor, device=device)
        made = torch.empty(tensor.shape, device=device, dtype=dtype)
        return made.normal_(std=0.02) if made.ndim > 1 else made.fill_(1.0)

    made: nn.Module = copy.deepcopy(block.module)._apply(random)
    return made


def _step(
    model: ModelQuantization,
    block: nn.Module,
    call: BlockCall,
    weights: Weights,
    batch: tuple[Tensor, ...],
    precision: AbstractContextManager[object],
    run: BlockRunner,
) -> float:
    """Seconds of a training step of one batch."""
    device, quantizers = batch[0].device, {}
    for site, scheme in weights.items():
        low, high, dtype = scheme.grid.low, scheme.grid.high, scheme.grid.code_dtype
        codes = torch.randint(low, high + 1, (site.rows, site.in_features), dtype=dtype, device=device)
        stored = scheme.parts(site.in_features).items()
        parts = {name: torch.full((site.rows, part.columns), 0.02, device=device) for name, part in stored}
        generator = generator_of("probe", site.name)
        quantizers[site] = quantizer_of(
            Start(codes, parts.pop(SCALES), codes, parts), scheme, model.block.gumbel, generator
        )
    module = BlockQuantization(block, call, quantizers, model.block.optimizer, run=run).to(device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = model.block.optimizer([{"params": parameters, "name": "logits"}])

    def step(number: int) -> None:
        with precision:
            loss = module.loss(batch, module.sampled_weights(number))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return median_seconds(step, device)
