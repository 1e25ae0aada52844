"""What to look at in TensorBoard while blocks train."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_gsq.training import BlockQuantization

FEWEST = 5
"""Points that the curve of a block has at least, where it has as many steps."""
HISTOGRAM_SAMPLE = 1 << 16
"""Weights of a matrix that a histogram is made of: enough to see its shape."""


class QuantizationMonitor(Callback):
    """Logs how the level choices of a block develop.

    Every ``every_n_steps``: the loss of the rounded weights beside that of the sample, tau, kappa, learning rates. At
    the end of a block: histograms of level usage, assignment entropy and scale drift, and a figure with the relative
    error of each weight matrix.

    Example::

        Trainer(logger=TensorBoardLogger("runs"), callbacks=[QuantizationMonitor(every_n_steps=20)])

    Args:
        every_n_steps: Steps between two measurements of the rounded weights' loss, each one forward pass more;
            fewer where a block has less than five times as many; 0 for none.
        histograms: Log histograms and the figure at the end of each block.
    """

    watches_only = True
    blocks_only = True

    def __init__(self, every_n_steps: int = 20, histograms: bool = True) -> None:
        self.every_n_steps, self.histograms = max(0, every_n_steps), histograms

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs scalars."""
        if not isinstance(pl_module, BlockQuantization) or not self.every_n_steps:
            return
        # A block of few steps has a curve as well.
        every = min(self.every_n_steps, max(1, int(trainer.estimated_stepping_batches) // FEWEST))
        if trainer.global_step % every:
            return
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            figures = {"block/loss_hard": float(pl_module.loss(batch, pl_module.hard_weights()))}
        _, quantizer = next(pl_module.named_quantizers())
        figures |= {
            "annealing/temperature": quantizer.temperature,
            "annealing/logit_scale": quantizer.logit_scale,
        }
        for group in trainer.optimizers[0].param_groups:
            figures[f"learning_rate/{group.get('name', 'parameters')}"] = float(group["lr"])
        step = pl_module.first_step + trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs histograms and the figure of the block."""
        if not isinstance(pl_module, BlockQuantization) or not self.histograms:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                self._histograms(logger.experiment, pl_module)
                self._figure(logger.experiment, pl_module)

    def _histograms(self, writer: SummaryWriter, module: BlockQuantization) -> None:
        for name, quantizer in module.named_quantizers():
            codes = _sample(quantizer.codes_OI().float())
            levels = torch.tensor(quantizer.scheme.grid.levels, dtype=torch.float32)
            edges = torch.cat([levels - 0.5, levels[-1:] + 0.5]).tolist()
            writer.add_histogram(f"levels/{name}", codes.numpy(), module.index, bins=edges)
            writer.add_histogram(f"entropy_bits/{name}", _sample(quantizer.entropy_OI()).numpy(), module.index)
            drift = quantizer.log_scale.detach().float().exp().cpu().flatten()
            writer.add_histogram(f"scale_drift/{name}", drift.numpy(), module.index)

    def _figure(self, writer: SummaryWriter, module: BlockQuantization) -> None:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display

        errors = matrix_errors(module)
        figure = Figure(figsize=(7, 0.4 * len(errors) + 1.2), layout="constrained")
        axes = figure.subplots()
        axes.barh(list(errors), list(errors.values()))
        axes.invert_yaxis()
        axes.set_xlabel("relative squared error of the weight matrix")
        axes.set_title(module.name)
        writer.add_figure("weight_error", figure, module.index)


@torch.no_grad()
def matrix_errors(module: BlockQuantization) -> dict[str, float]:
    """``|W - W_q|^2 / |W|^2`` of each weight matrix against the full-precision block."""
    hard = module.hard_weights()
    errors = {}
    for name, dense in hard.items():
        original = module.block.get_parameter(name)
        errors[name] = float((dense - original).square().sum() / original.square().sum().clamp_min(1e-12))
    return errors


def _sample(values: Tensor) -> Tensor:
    flat = values.detach().cpu().flatten()
    return flat[:: max(1, len(flat) // HISTOGRAM_SAMPLE)]
