"""What a plan is made for: the machine, and settings that several of its terms depend on."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_gsq.estimate import limits
from lightning_gsq.estimate.quantities import Surroundings, optimizer_state
from lightning_gsq.models import loading
from lightning_gsq.training import EndToEndOptions, ModelQuantization


def surroundings(
    model: ModelQuantization,
    end_to_end: EndToEndOptions,
    trainer: Trainer,
    source: loading.ModelSource,
    as_stored: bool,
    device_memory: float | None,
) -> Surroundings:
    """The surroundings of a run.

    Args:
        model: The model's settings.
        end_to_end: The end-to-end phase's.
        trainer: A Trainer with the user's settings.
        source: Where the model is.
        as_stored: Whether its weights are mapped from files, its own or those that hold what is computed on loading.
        device_memory: Bytes of another machine's accelerator; None for what this one has.
    """
    device = trainer.strategy.root_device
    return Surroundings(
        bf16=trainer.precision == "bf16-mixed",
        optimizer_state=optimizer_state(model),
        file_bytes=sum(file.stat().st_size for file in source.files) if source.gguf_file else 0,
        device_room=limits.device_bytes(device) if device_memory is None else int(device_memory),
        accelerated=device.type != "cpu" or device_memory is not None,
        mapped=source.gguf_file is None and model.address.dtype == "auto" and as_stored,
        spread=1 if end_to_end.strategy is None else trainer.world_size,
        experts_over=trainer.world_size if model.block.expert_parallel else 1,
        accumulates=trainer.accumulate_grad_batches > 1,
    )
