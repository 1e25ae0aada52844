"""Which weights of a block are salient, logged."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_gsq.errors import ConfigurationError


class SaliencyThreshold(Callback):
    """Logs what was chosen for each weight that has a salient part: ratio, number of scales, error, true bits.

    The choice itself is a setting of the model (``model.saliency``). A module says what was chosen by an attribute
    ``saliency``: figures by weight; one without it, or with an empty one, is left alone.

    Example::

        trainer = Trainer(max_steps=200, callbacks=[SaliencyThreshold(), GumbelAnnealing()])

    Args:
        price: Has moved to model.saliency.price.
        max_ratio: Has moved to model.saliency.max_ratio.
        graph: Has moved to model.saliency.graph.
        menu: Has moved to model.saliency.menu.

    Raises:
        ConfigurationError: one of these was given.
    """

    watches_only = True
    blocks_only = True

    def __init__(
        self,
        price: float | None = None,
        max_ratio: float | None = None,
        graph: dict[str, Any] | None = None,
        menu: dict[str, Any] | None = None,
    ) -> None:
        moved = {"price": price, "max_ratio": max_ratio, "graph": graph, "menu": menu}
        for name, value in moved.items():
            if value is not None:
                raise ConfigurationError(
                    f"SaliencyThreshold.{name}={value} is a setting of the model now: --model.saliency.{name}"
                )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Logs the figures."""
        chosen = getattr(pl_module, "saliency", None)
        if not chosen:
            return
        figures = {f"saliency_{what}/{name}": value for name, own in chosen.items() for what, value in own.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=getattr(pl_module, "index", 0))
