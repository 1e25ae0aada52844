"""The end of a relaxed training: every weight takes its most probable level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import GumbelQuantizer
from lightning_gsq.training import BlockQuantization


@dataclass(frozen=True)
class RoundingReport:
    """What rounding did to one module.

    Args:
        flip_rate: Share of weights whose code differs from the warm start.
        gap: Validation loss of the rounded weights minus that of a relaxed sample; None without validation.
        soft_loss: Validation loss of a relaxed sample; None without validation.
    """

    flip_rate: float
    gap: float | None
    soft_loss: float | None


class HardRounding(Callback):
    """Swaps in the hard weights when a fit ends, and reports the rounding gap and the flip rate.

    Afterwards every ``GumbelQuantizer`` of the module returns its rounded weight. Both figures tell whether the
    relaxation was tight: a large gap means that training ended undecided (lower the final temperature), a flip rate
    near zero that it never left the warm start (raise the learning rate or the number of steps).

    Example::

        rounding = HardRounding()
        Trainer(max_steps=200, callbacks=[GumbelAnnealing(), rounding]).fit(module, batches, held_out)
        rounding.report.flip_rate

    Args:
        soft_metric: Logged validation loss of relaxed samples.
        hard_metric: Logged validation loss of the rounded weights.
        max_gap: Warn when the gap exceeds this share of the soft loss; null never warns.
    """

    watches_only = True
    blocks_only = True

    report: RoundingReport

    def __init__(
        self,
        soft_metric: str = "block/val_loss_soft",
        hard_metric: str = "block/val_loss_hard",
        max_gap: float | None = 0.5,
    ) -> None:
        if max_gap is not None and max_gap <= 0:
            raise ConfigurationError(f"HardRounding.max_gap must be positive or null, got {max_gap}")
        self.soft_metric, self.hard_metric, self.max_gap = soft_metric, hard_metric, max_gap

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rounds, reports, logs."""
        quantizers = [module for module in pl_module.modules() if isinstance(module, GumbelQuantizer)]
        if not quantizers:
            raise ConfigurationError(f"HardRounding: {type(pl_module).__name__} has no GumbelQuantizer")
        flip_rate = _flip_rate(pl_module, quantizers)
        for quantizer in quantizers:
            quantizer.hard = True
        metrics = trainer.callback_metrics
        soft = float(metrics[self.soft_metric]) if self.soft_metric in metrics else None
        gap = float(metrics[self.hard_metric]) - soft if soft is not None and self.hard_metric in metrics else None
        self.report = RoundingReport(flip_rate, gap, soft)
        figures = {"rounding/flip_rate": flip_rate}
        if soft is not None and gap is not None:
            figures["rounding/gap"] = gap
            if self.max_gap is not None and gap > self.max_gap * soft > 0:
                rank_zero_warn(
                    f"rounding raised the loss from {soft:.4g} to {soft + gap:.4g}: the choices were still open at the "
                    "end; lower the final temperature or train longer"
                )
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step + getattr(pl_module, "first_step", 0))


def _flip_rate(module: LightningModule, quantizers: Sequence[GumbelQuantizer]) -> float:
    if isinstance(module, BlockQuantization):
        return module.flip_rate()  # which knows of experts that other processes hold
    flipped = sum(int((q.codes_OI() != q.start_codes).sum()) for q in quantizers)
    return flipped / sum(q.start_codes.numel() for q in quantizers)
