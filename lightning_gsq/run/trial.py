"""One step with the user's optimizers and Trainer on a tiny module, before anything long: what they refuse, they refuse
now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.training import EndToEndOptions, ModelQuantization
from lightning_gsq.training.block import block_groups, check_rounding
from lightning_gsq.training.schedule import cosine_to_floor

REFUSALS = (MisconfigurationException, ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError)
"""What optimizers and Lightning raise for settings that do not go together."""
Groups = list[dict[str, Any]]


class _Tiny(LightningModule):
    """Parameters of every kind that trains, and an optimizer over their groups."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Callable[[], Any]) -> None:
        super().__init__()
        self.trained, self.optimizer = nn.ParameterList(parameters), optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A loss with a gradient for each of them."""
        loss: Tensor = sum((parameter.float().square().sum() for parameter in self.trained), batch.sum() * 0)
        return loss

    def configure_optimizers(self) -> Any:
        """As the real modules do it."""
        optimizer = self.optimizer()
        return {"optimizer": optimizer, "lr_scheduler": cosine_to_floor(optimizer, 1, 0.1)}


def try_settings(model: ModelQuantization, options: EndToEndOptions, make_trainer: Callable[..., Trainer]) -> None:
    """Takes a step for each phase that trains.

    Args:
        model: The settings of the blocks.
        options: Those of the end-to-end phase.
        make_trainer: Makes a Trainer with the user's settings, some of them replaced where arguments name them.

    Raises:
        ConfigurationError: a step fails; the message says in which settings, and what they were told.
    """
    if "blocks" in model.phases:
        logits = nn.Parameter(torch.full((3, 4, 8), 0.01, dtype=getattr(torch, model.block.gumbel.logits_dtype)))
        scales = nn.Parameter(torch.full((4, 1), 0.01))

        def block_optimizer() -> torch.optim.Optimizer:
            optimizer = model.block.optimizer(block_groups([logits], [scales], model.block.scale_learning_rate))
            check_rounding(optimizer, [logits])
            return optimizer

        _step([logits, scales], block_optimizer, "model.optimizer and trainer", make_trainer)
    if "end_to_end" in model.phases:
        kinds = {(kind, 1.0): [nn.Parameter(torch.full((4, 8), 0.01))] for kind in options.train}

        def phase_optimizer() -> torch.optim.Optimizer:
            return options.rates.make_optimizer(kinds)

        parameters = [parameter for group in kinds.values() for parameter in group]
        _step(parameters, phase_optimizer, "end_to_end.optimizer and trainer", make_trainer)


def _step(
    parameters: list[nn.Parameter],
    optimizer: Callable[[], torch.optim.Optimizer],
    what: str,
    make_trainer: Callable[..., Trainer],
) -> None:
    batches: DataLoader[Tensor] = DataLoader(torch.zeros(1, 1), batch_size=1)  # type: ignore[arg-type]
    try:
        trainer = make_trainer(
            devices=1,
            num_nodes=1,
            strategy="auto",
            logger=False,
            callbacks=[],
            profiler=None,
            plugins=None,
            max_epochs=1,
            min_epochs=None,
            max_steps=-1,
            min_steps=None,
            limit_train_batches=1.0,
            accumulate_grad_batches=1,
            enable_checkpointing=False,
        )
        trainer.fit(_Tiny(parameters, optimizer), batches)
    except ConfigurationError:
        raise
    except REFUSALS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigurationError(f"{what}: a step on a small example failed: {lines[0]}") from error
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise ConfigurationError(f"{what}: after one step on a small example a parameter is not finite")
