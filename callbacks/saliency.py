"""Which weights of a block are salient, chosen before the block trains."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import Matrix
from lightning_gsq.saliency import Choice, GraphOptions, Menu, SettleOptions, settle
from lightning_gsq.saliency.budget import MAX_RATIO
from lightning_gsq.saliency.unsettled import UnsettledQuantizer
from lightning_gsq.system.stopwatch import Stopwatch


class SaliencyThreshold(Callback):
    """Settles the salient part of every weight that has one, before the optimizer is made.

    Replaces each ``UnsettledQuantizer`` of the module by a trainable one, and logs ratio, number of scales, error and
    true bits of each matrix. A module without salient weights is left as it is.

    Example::

        trainer = Trainer(max_steps=200, callbacks=[SaliencyThreshold(price=0.05), GumbelAnnealing()])

    Args:
        price: Relative squared error of a matrix that one true bit a weight is worth, where scheme.salient.ratio is
            null.
        max_ratio: Largest salient ratio of that search.
        graph: How scales are counted, where scheme.salient.scale_groups is "graph".
        menu: What scheme.budget may be spent on.
    """

    def __init__(
        self,
        price: float = 0.1,
        max_ratio: float = MAX_RATIO,
        graph: GraphOptions = GraphOptions(),  # noqa: B008 - frozen
        menu: Menu = Menu(),  # noqa: B008 - frozen
    ) -> None:
        if price <= 0:
            raise ConfigurationError(f"SaliencyThreshold.price must be positive, got {price}")
        if not 0 < max_ratio < 1:
            raise ConfigurationError(f"SaliencyThreshold.max_ratio must lie between 0 and 1, got {max_ratio}")
        self.options = SettleOptions(price, max_ratio, graph, menu)
        self.watch = Stopwatch()

    def choose(self, matrices: Mapping[str, Matrix]) -> dict[str, Choice]:
        """The salient part of each matrix of a block."""
        with self.watch("saliency"):
            return settle(matrices, self.options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses, replaces, logs."""
        waiting = {
            child.name: (parent, key, child)
            for parent in list(pl_module.modules())
            for key, child in parent.named_children()
            if isinstance(child, UnsettledQuantizer)
        }
        if not waiting:
            return
        choices = self.choose({name: child.matrix for name, (_, _, child) in waiting.items()})
        figures: dict[str, float] = {}
        for name, (parent, key, child) in waiting.items():
            parent.add_module(key, child.build(choices[name]))
            figures |= {f"saliency_{what}/{name}": value for what, value in choices[name].figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=getattr(pl_module, "index", 0))
