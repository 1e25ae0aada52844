"""One progress bar over all blocks of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import Progress

from lightning_gsq.system.bar import make_bar
from lightning_gsq.system.console import make_console
from lightning_gsq.system.stopwatch import duration
from lightning_gsq.training import BlockQuantization


class BlockProgress(Callback):
    """A bar over the blocks, with the inner steps, the current loss and an estimate of the time left.

    On a terminal it is a live bar; there and elsewhere (a log file, CI) each block leaves a line. *Error* is the
    squared error of the block's output on held-out sequences, over the mean square of what it should be.

    Example::

        Trainer(callbacks=[BlockProgress()]).fit(BlockQuantization(...), batches)

    Args:
        refresh_every: Steps between updates of the shown loss.
    """

    watches_only = True
    blocks_only = True

    def __init__(self, refresh_every: int = 5) -> None:
        self.refresh_every = max(1, refresh_every)
        self.console = make_console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._began = 0.0
        self._blocks_here = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar with the first block of this process."""
        if not trainer.is_global_zero or not isinstance(pl_module, BlockQuantization):
            return
        position, total = pl_module.position
        if self._blocks_here == 0:
            self._began = time.perf_counter()
        if not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = make_bar("blocks", self.console)
            self._bar.start()
            self._task = self._bar.add_task("blocks", total=total, completed=position, inner="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar by one inner step."""
        if self._bar is None or not isinstance(pl_module, BlockQuantization):
            return
        steps = max(1, int(trainer.estimated_stepping_batches))
        if trainer.global_step % self.refresh_every == 0 or trainer.global_step == steps:
            loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
            inner = f"{pl_module.name}  step {trainer.global_step}/{steps}  loss {loss:.4f}"
            self._bar.update(self._task, completed=pl_module.position[0] + trainer.global_step / steps, inner=inner)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the block's part; closes the bar after the last block."""
        if not trainer.is_global_zero or not isinstance(pl_module, BlockQuantization):
            return
        position, total = pl_module.position
        self._blocks_here += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=position + 1)
            if position + 1 == total:
                self.close()
        if not pl_module.measured_afterwards:
            hard = trainer.callback_metrics.get("block/val_loss_hard")
            self._line(pl_module, "" if hard is None else f"  error {float(hard):.4f}")

    def on_block_measured(self, module: BlockQuantization, measures: Mapping[str, float]) -> None:
        """Leaves a line of a block of a run, in a terminal and in a log.

        Args:
            module: The block.
            measures: Held-out errors ``start`` and ``final``, ``flip_rate``, ``seconds``.
        """
        figures = f"  error {measures['start']:.4f} -> {measures['final']:.4f}"
        figures += f"  codes moved {measures['flip_rate']:.1%}  {measures['seconds']:.1f} s"
        self._line(module, figures)

    def _line(self, module: BlockQuantization, figures: str) -> None:
        position, total = module.position
        line = f"block {position + 1}/{total}  {module.name}{figures}"
        if not self.console.is_terminal:  # where the bar says it
            elapsed = time.perf_counter() - self._began
            left = elapsed / max(1, self._blocks_here) * (total - position - 1)
            line += f"  about {duration(left)} left" if left else ""
        self.console.print(line, soft_wrap=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the terminal clean."""
        self.close()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
