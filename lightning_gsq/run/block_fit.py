"""The fit of one block: quantizers from the warm start, a Trainer, and whether the result is better than the start."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import GumbelOptions, Matrix, WarmStart
from lightning_gsq.quantizers.salient import MixedQuantizer
from lightning_gsq.quantizers.vector_gumbel import quantizer_of
from lightning_gsq.quantizers.warm_start import start_of
from lightning_gsq.run.acceptance import accept, own_part, rows_of
from lightning_gsq.run.block_files import Blocks
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.block_start import start_block
from lightning_gsq.run.calibration import Sent
from lightning_gsq.run.following import Entering
from lightning_gsq.run.forward_passes import arguments_of
from lightning_gsq.run.hidden_states import ActivationDataset, Stream, first
from lightning_gsq.run.matrices import as_stored
from lightning_gsq.run.run import Run
from lightning_gsq.saliency import Choice
from lightning_gsq.saliency.choose import settled_start
from lightning_gsq.system.seeding import generator_of, seed_of
from lightning_gsq.system.token_exchange import OwnGradientsStrategy
from lightning_gsq.training import BlockQuantization
from lightning_gsq.training.block import WeightQuantizer
from lightning_gsq.training.token_weights import inherited_weights, typical_energy

BlockLoader = DataLoader[tuple[Tensor, ...]]


def fit_block(
    run: Run,
    plan: BlockPlan,
    block: nn.Module,
    inputs: Stream,
    full: Stream,
    targets: Stream,
    spare: Stream | None,
) -> tuple[Blocks, dict[str, Any]]:
    """Trains one block.

    Args:
        run: The run.
        plan: The block's weights and their schemes, as this process has them.
        block: The block on the device.
        inputs: What enters it in the quantized model: training sequences, then held-out ones.
        full: What enters it in the full-precision model.
        targets: What should leave it.
        spare: What enters it of sequences for experts that few tokens reach, in the quantized model; None without.

    Returns:
        Its quantized weights, as far as this process has them, and measures: held-out errors ``start``, ``trained``
        and ``final``, ``flip_rate``, plain weights that ``kept_start``, what became of ``experts`` by place, and what
        was logged last.
    """
    began = time.perf_counter()
    weights_NT = _token_weights(run, inputs.hidden_NTD, full.hidden_NTD)
    arguments = arguments_of(run.model.network, run.forms, run.calls[plan.index], plan.index, inputs)
    weights = [] if weights_NT is None else [weights_NT]
    streams = (inputs.hidden_NTD, targets.hidden_NTD, *weights, *arguments)
    count = len(run.train_ids_NT)
    training = ActivationDataset(*(stream[:count] for stream in streams))
    held_out = ActivationDataset(*(stream[count:] for stream in streams))
    power = _mean_square(run, *(stream[:count] for stream in (targets.hidden_NTD, *weights)))
    entering = Entering(inputs, full if run.model.follows else None, spare, arguments)
    module, sent = _module(run, plan, block, entering, power)
    module.measured_afterwards = True
    batches = _training_batches(run, plan, training)
    validation: BlockLoader = DataLoader(held_out, batch_size=run.data.batch_size, collate_fn=first)
    trainer = run.make_trainer() if run.exchange is None else run.make_trainer(strategy=OwnGradientsStrategy())
    with run.watch("training"):
        trainer.fit(module, batches, validation)
    _let_go(trainer)
    module.to(run.device)
    with run.watch("check"):
        accepted = accept(run, module, validation, plan.held)
    line = accepted.line(plan.name)
    if line is not None:
        run.say(line)
    rows = {
        site.name: rows_of(site, own_part(accepted.trained[site.name], plan.held.get(site.name)))
        for site in module.sites
    }
    measures = {**accepted.measures, "flip_rate": module.flip_rate(rows)}
    _tell(trainer, module, {**measures, "seconds": time.perf_counter() - began})
    dtype = run.model.storage.scale_dtype
    tensors = {
        name: as_stored(
            quantizer.blend(rows[name], dtype),
            site.to_matrix(module.block.get_parameter(name)),
            f"{plan.name}.{name}",
        )
        for site, (name, quantizer) in zip(module.sites, module.named_weights(), strict=True)
    }
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    experts = {
        place: ({"tokens": sent[place]} if place in sent else {}) | own for place, own in accepted.experts.items()
    }
    kept = {"kept_start": accepted.plain_at_start, "experts": experts}
    return tensors, {**measures, **logged, **{name: what for name, what in kept.items() if what}}


def _module(
    run: Run, plan: BlockPlan, block: nn.Module, entering: Entering, target_power: float
) -> tuple[BlockQuantization, Sent]:
    """The block with a quantizer for each of its weights, and the tokens that its routers send to each expert."""
    figures: dict[str, Mapping[str, float]] = {}

    def begin(site: LinearSite, matrix: Matrix, choice: Choice | None) -> WeightQuantizer:
        if choice is not None:
            figures[site.name] = choice.figures
        return _quantizer(run, plan, site, matrix, choice)

    started, sent = start_block(run, plan, block, entering, begin, lambda weight: weight.start_tensor(), says=True)
    quantizers = {site: started[site.name] for site in plan.weights}
    module = BlockQuantization(
        block,
        run.calls[plan.index],
        quantizers,
        run.model.block.optimizer,
        scale_learning_rate=run.model.block.scale_learning_rate,
        learning_rate_floor=run.model.block.learning_rate_floor,
        target_power=target_power,
        index=plan.index,
        name=plan.name,
        seed=run.seed,
        position=([planned.index for planned in run.plan].index(plan.index), len(run.plan)),
        run=run.run_block,
        saliency=figures,
        exchange=run.exchange,
    )
    return module, sent


def _quantizer(run: Run, plan: BlockPlan, site: LinearSite, matrix: Matrix, choice: Choice | None) -> WeightQuantizer:
    key, held = (run.seed, plan.index, site.name, "logits"), plan.held.get(site.name)
    # The noise of an expert is its own, so that it does not depend on which others its process has.
    generators = [generator_of(*key)] if held is None else [generator_of(*key, expert) for expert in held]
    first_row = 0 if held is None else held.start * site.out_features
    options = run.model.block.gumbel
    return make_quantizer(matrix, choice, run.model.start.warm_start, options, *generators, first_row=first_row)


@torch.no_grad()
def make_quantizer(
    matrix: Matrix,
    choice: Choice | None,
    warm_start: WarmStart,
    options: GumbelOptions,
    *generators: torch.Generator,
    first_row: int = 0,
) -> WeightQuantizer:
    """The trainable form of a weight, from its warm start.

    Args:
        matrix: The weight.
        choice: Its salient part; None for a scheme without one.
        warm_start: Gives codes and scales.
        options: How logits start.
        generators: Of the logits' noise: one, or one for each expert where there is no salient part.
        first_row: As of :class:`~lightning_gsq.quantizers.GumbelQuantizer`.
    """
    if choice is None:
        start = start_of(matrix, warm_start)
        return quantizer_of(start, matrix.scheme, options, *generators, first_row=first_row)
    return MixedQuantizer(settled_start(matrix, choice, warm_start), choice.scheme, options, *generators)


def _training_batches(run: Run, plan: BlockPlan, training: ActivationDataset) -> BlockLoader:
    process = (run.ranks.rank,) if run.ranks.rank else ()
    return DataLoader(
        training,
        batch_size=run.data.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed_of(run.seed, plan.index, "order", *process)),
        collate_fn=first,
        drop_last=len(training) >= run.data.batch_size,
        pin_memory=run.device.type == "cuda",  # copied while the step before still computes
    )


def _tell(trainer: Trainer, module: BlockQuantization, measures: Mapping[str, float]) -> None:
    """Hands what was measured of a finished block to callbacks with a method ``on_block_measured``."""
    for callback in trainer.callbacks if trainer.is_global_zero else []:  # type: ignore[attr-defined]
        hook = getattr(callback, "on_block_measured", None)
        if hook is not None:
            hook(module, measures)


def _let_go(trainer: Trainer) -> None:
    """Lightning binds the module to callbacks, which outlive a block and would keep its training state alive."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
        vars(callback).pop("log", None)
        vars(callback).pop("log_dict", None)


def _mean_square(run: Run, x_NTD: Tensor, weights_NT: Tensor | None = None) -> float:
    if weights_NT is None:
        return run.mean(sum(float(x.float().square().mean()) for x in x_NTD) / len(x_NTD))
    pairs = zip(x_NTD, weights_NT, strict=True)
    return run.mean(sum(float((x.float().square().mean(-1) * w).mean()) for x, w in pairs) / len(x_NTD))


def _token_weights(run: Run, quantized_NTD: Tensor, full_NTD: Tensor) -> Tensor | None:
    """How much each token counts in the loss; None where all count alike."""
    if run.model.block.inherited_error is None:
        return None
    tolerated = run.model.block.inherited_error * run.mean(typical_energy(full_NTD[: len(run.train_ids_NT)]))
    return inherited_weights(quantized_NTD, full_NTD, tolerated)
