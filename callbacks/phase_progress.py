"""Progress of the end-to-end phase."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import Progress

from lightning_gsq.system.bar import make_bar
from lightning_gsq.system.console import make_console
from lightning_gsq.system.stopwatch import duration
from lightning_gsq.training import EndToEndQuantization


class EndToEndProgress(Callback):
    """A bar over the optimizer steps on a terminal; elsewhere one line an evaluation.

    Example::

        Trainer(callbacks=[EndToEndProgress()]).fit(EndToEndQuantization(...), batches, held_out)
    """

    watches_only = True

    def __init__(self) -> None:
        self.console = make_console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar."""
        self._began = time.perf_counter()
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = make_bar("end to end", self.console)
            self._bar.start()
            self._task = self._bar.add_task("steps", total=_steps(trainer), inner="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        if self._bar is not None:
            loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
            self._bar.update(self._task, completed=trainer.global_step, inner=f"loss {loss:.4f}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints a line where there is no bar."""
        if not trainer.is_global_zero or self._bar is not None or not isinstance(pl_module, EndToEndQuantization):
            return
        line = f"end to end  held-out loss {float(trainer.callback_metrics['end_to_end/val_loss']):.4f}"
        step = trainer.global_step
        if step and trainer.state.fn == "fit":
            steps = _steps(trainer)
            left = (time.perf_counter() - self._began) / step * (steps - step)
            line += f"  step {step}/{steps}  about {duration(left)} left"
        self.console.print(line)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the terminal clean."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _steps(trainer: Trainer) -> int:
    return max(1, int(trainer.estimated_stepping_batches))
