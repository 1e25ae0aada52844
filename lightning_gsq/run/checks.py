"""What a run refuses before it begins: settings that would do nothing, or something else than they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.vector_grid import VectorGrid

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
AT_LEAST = {
    # settings of the trainer and the least number that means something
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "limit_train_batches": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
ZERO_TRAINS_NOTHING = ("max_epochs", "max_steps", "limit_train_batches")
WHOLE_ONLY: dict[str, float] = {
    # settings that shrink what is measured, with the value beside null that does not; one batch is the integer 1
    "limit_val_batches": 1.0,
    "overfit_batches": 0.0,
    "fast_dev_run": 0.0,
    "barebones": 0.0,
}


def check_trainer(settings: Mapping[str, Any], trainer: Trainer, phases: Sequence[str]) -> None:
    """Verifies the settings of the trainer.

    Args:
        settings: As they were given, plain data.
        trainer: Made from them.
        phases: What it will be used for.

    Raises:
        ConfigurationError: one means nothing here; the message names it.
    """
    if not str(settings.get("default_root_dir") or "").strip():
        raise ConfigurationError("trainer.default_root_dir is empty: name the run folder")
    if trainer.precision not in PRECISIONS:
        raise ConfigurationError(
            f"trainer.precision: logits and scales train in 32 bits, got {trainer.precision}; use one of "
            f"{', '.join(PRECISIONS)}"
        )
    for name, least in AT_LEAST.items():
        value = settings.get(name)
        if isinstance(value, int | float) and value < least:
            raise ConfigurationError(f"trainer.{name} must be at least {least}, got {value}")
    for name, harmless in WHOLE_ONLY.items():
        value = settings.get(name)
        one_batch = value == 1 and isinstance(value, int)
        if value is not None and (value != harmless or one_batch):
            raise ConfigurationError(
                f"trainer.{name}={value} would shrink or drop what a run measures and reports; leave it out. "
                "For a trial use --model.blocks 0:1, fewer --data.num_sequences and --evaluation.num_windows"
            )
    if "blocks" not in phases:
        return
    for name in ZERO_TRAINS_NOTHING:
        if settings.get(name) == 0 and not isinstance(settings.get(name), bool):
            raise ConfigurationError(
                f"trainer.{name}=0 would train nothing; for the warm start alone use --model.phases [init]"
            )
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigurationError("trainer.max_epochs: -1 would train the first block for ever; give epochs or steps")


def check_layouts(plan: Sequence[BlockPlan], phases: Sequence[str], train: Sequence[str]) -> None:
    """Verifies that what trains has a layout that can.

    Args:
        plan: The weights.
        phases: Those of the run.
        train: What trains in the end-to-end phase.

    Raises:
        ConfigurationError: it has not.
    """
    schemes = {scheme for block in plan for scheme in block.weights.values()}
    element = any(scheme.salient is not None and scheme.salient.layout == "element" for scheme in schemes)
    if element and set(phases) != {"init"}:
        raise ConfigurationError(
            "model.scheme.salient.layout: element is the published layout, which is not trained; use "
            "--model.phases [init], or structured"
        )
    vectors = next((scheme for scheme in schemes if isinstance(scheme.grid, VectorGrid)), None)
    if vectors is not None and "codes" in train and "end_to_end" in phases:
        raise ConfigurationError(
            f"end_to_end.train: the codes of {vectors} are vectors, which have no neighbours to round to; leave codes "
            "out"
        )


@torch.no_grad()
def check_scales(model: ModelQuantization, plan: Sequence[BlockPlan]) -> None:
    """Verifies that float16 reaches the scales of every weight: a group's largest weight over the largest level.

    Raises:
        ConfigurationError: it does not.
    """
    dtype = model.storage.scale_dtype
    if dtype != torch.float16:
        return
    blocks, limits = find_blocks(model.network)[1], torch.finfo(dtype)
    for block in plan:
        for site, scheme in block.weights.items():
            if scheme.preset is not None:  # its scales have a layout of their own
                continue
            w_OI = site.to_matrix(blocks[block.index].get_parameter(site.name))
            length = scheme.group_length(site.in_features)
            for part_OC in w_OI.split(length, dim=1):
                scales_O = part_OC.abs().amax(1).float() / max(abs(scheme.grid.levels[0]), 1)
                lost = (scales_O > 0) & (scales_O < limits.smallest_normal * limits.eps / 2)
                if bool(lost.any()) or bool((scales_O > limits.max).any()):
                    what = "large" if not bool(lost.any()) else "small"
                    raise ConfigurationError(
                        f"model.scale_dtype: float16 holds no scales as {what} as those of {block.name}.{site.name}; "
                        "use bfloat16 or float32, or leave the weight out with --model.exclude"
                    )
