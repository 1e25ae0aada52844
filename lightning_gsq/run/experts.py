"""Experts that are spread over the processes of a run: whether they can be, and their weights as files hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.expert_parallel import check_parts, fused_experts, held_weights, share_of
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import FromFile
from lightning_gsq.run.block_files import Blocks
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.run import Run
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme


def check_expert_parallel(model: ModelQuantization, plan: Sequence[BlockPlan], trainer: Trainer) -> None:
    """Verifies, where experts are to be spread, that they can be.

    Args:
        model: The model, loaded, and its settings.
        plan: The weights to quantize.
        trainer: Made from the user's settings.

    Raises:
        ConfigurationError: they cannot; the message says why.
    """
    if not model.block.expert_parallel:
        return
    blocks = find_blocks(model.network)[1]
    check_spread(model, model.network, {block.index: block.weights for block in plan}, trainer)
    if trainer.world_size > 1:
        modules = [module for block in plan for module in fused_experts(blocks[block.index]).values()]
        for module in {type(module): module for module in modules}.values():
            check_parts(module, trainer.world_size)


def check_spread(
    model: ModelQuantization,
    network: PreTrainedModel,
    plan: Mapping[int, Mapping[LinearSite, QuantScheme]],
    trainer: Trainer,
) -> None:
    """Verifies what settings and shapes say of experts that are to be spread; no weight is looked at.

    Args:
        model: The settings.
        network: The model; on the meta device, if need be.
        plan: The weights to quantize of each block.
        trainer: Made from the user's settings.

    Raises:
        ConfigurationError: they cannot be spread; the message says why.
    """
    if not model.block.expert_parallel:
        return
    option, world = "model.expert_parallel", trainer.world_size
    prefix, blocks = find_blocks(network)
    spread = [
        (f"{prefix}.{index}.{site.name}", site.experts, scheme)
        for index, weights in plan.items()
        for site, scheme in weights.items()
        if site.experts and site.name in held_weights(blocks[index], 0, 1)
    ]
    if not spread:
        there = any(site.experts for weights in plan.values() for site in weights)
        how = "do not run through transformers' interface for experts" if there else "are not among those to quantize"
        raise ConfigurationError(
            f"{option}: there is nothing to spread in {type(network).__name__}: routed experts {how}; leave it out"
        )
    for weight, experts, scheme in spread:
        if experts < world:
            raise ConfigurationError(
                f"{option}: {weight} has {experts} experts, which cannot be shared by {world} processes; give "
                f"--trainer.devices at most {experts}"
            )
        if scheme.mixed:
            raise ConfigurationError(
                f"{option}: the salient part of {weight} ({scheme}) is chosen over all of its experts; give routed "
                "experts another scheme with --model.overrides, or leave it out"
            )
    _check_settings(model, trainer, option)


def _check_settings(model: ModelQuantization, trainer: Trainer, option: str) -> None:
    if isinstance(model.start.warm_start, FromFile):
        raise ConfigurationError(
            f"{option}: the warm start FromFile takes all experts of a weight at once; use another, or leave it out"
        )
    asked = model.start.experts.option
    if asked is not None:
        raise ConfigurationError(
            f"{asked}: spread experts ({option}) see the tokens of the run's own sequences alone; use one of the two"
        )
    if model.start.end_loss_weights:
        raise ConfigurationError(
            f"model.end_loss_weights: gradients pass through whole blocks, and spread experts ({option}) lie in "
            "several processes; use one of the two"
        )
    if trainer.precision == "16-mixed":
        raise ConfigurationError(
            f"{option}: a loss scale of 16-mixed would be another in each process; use --trainer.precision bf16-mixed"
        )
    watched = model.start.watches_inputs or model.start.save_imatrix
    if watched and model.start.hessian_sequences < trainer.world_size:
        raise ConfigurationError(
            f"model.hessian_sequences: {model.start.hessian_sequences} sequences cannot be shared by "
            f"{trainer.world_size} processes whose experts are spread; give at least {trainer.world_size}"
        )


def own_part(run: Run, plan: BlockPlan, tensors: Blocks) -> Blocks:
    """Of a block's weights as its file holds them, what this process has."""
    own = run.own(plan)
    return {name: _rows(run, own, name, tensor) if name in own.held else tensor for name, tensor in tensors.items()}


def _rows(run: Run, own: BlockPlan, name: str, tensor: object) -> QuantizedTensor:
    assert isinstance(tensor, QuantizedTensor)
    each = tensor.shape[0] // _experts(run, own, name)
    held = own.held[name]
    return tensor.map(lambda part: part[held.start * each : held.stop * each])


def whole(run: Run, plan: BlockPlan, tensors: Blocks) -> Blocks:
    """A block's weights as its file holds them, in the first process, from what each process has."""
    own, together = run.own(plan), dict(tensors)
    if run.exchange is None:
        return together
    for name in own.held:
        tensor = tensors[name]
        assert isinstance(tensor, QuantizedTensor)
        together[name] = tensor.map(lambda part, name=name: of_all_processes(run, own, name, part))  # type: ignore[misc]
    return together


def of_all_processes(run: Run, own: BlockPlan, name: str, part: Tensor) -> Tensor:
    """Rows of all experts of a weight, in the first process.

    Args:
        run: The run.
        own: This process's part of what is done with the block.
        name: The weight's name in the block.
        part: Rows of the experts that this process has, as many for each; or of all, if it has all of this weight.
    """
    if run.exchange is None or name not in own.held:
        return part
    each, experts = len(part) // len(own.held[name]), _experts(run, own, name)
    counts = [each * len(share_of(experts, rank, run.ranks.world)) for rank in range(run.ranks.world)]
    return run.ranks.gather_rows(part, counts, torch.device(run.device))


def _experts(run: Run, own: BlockPlan, name: str) -> int:
    return len(run.blocks[own.index].get_parameter(name))
