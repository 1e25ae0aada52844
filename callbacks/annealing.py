"""Temperature and logit scale of Gumbel quantizers, from the first step to the last."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import GumbelQuantizer


class GumbelAnnealing(Callback):
    """Sets tau and kappa of every ``GumbelQuantizer`` in the module before each optimizer step, both linear in time.

    A high temperature keeps a weight's choice open, a low one makes samples nearly discrete; kappa raises the
    logits over the noise.

    Example::

        trainer = Trainer(max_steps=200, callbacks=[GumbelAnnealing(temperature=(2.0, 0.05))])

    Args:
        temperature: tau at the first and at the last step.
        logit_scale: kappa at the first and at the last step.
    """

    def __init__(
        self,
        temperature: tuple[float, float] = (2.0, 0.05),
        logit_scale: tuple[float, float] = (100.0, 500.0),
    ) -> None:
        for name, values in (("temperature", temperature), ("logit_scale", logit_scale)):
            if min(values) <= 0:
                raise ConfigurationError(f"GumbelAnnealing.{name} must be positive, got {values}")
        self.temperature, self.logit_scale = temperature, logit_scale

    def at(self, progress: float) -> tuple[float, float]:
        """tau and kappa when ``progress`` (0 to 1) of the steps are done."""
        (tau_0, tau_1), (kappa_0, kappa_1) = self.temperature, self.logit_scale
        return tau_0 + (tau_1 - tau_0) * progress, kappa_0 + (kappa_1 - kappa_0) * progress

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets both for the coming step."""
        last = max(1, int(trainer.estimated_stepping_batches) - 1)
        tau, kappa = self.at(min(trainer.global_step / last, 1.0))
        for module in pl_module.modules():
            if isinstance(module, GumbelQuantizer):
                module.temperature, module.logit_scale = tau, kappa
