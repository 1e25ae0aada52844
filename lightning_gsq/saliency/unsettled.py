"""A place in a module for a quantizer whose salient part has yet to be chosen."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import Matrix
from lightning_gsq.quantizers.salient import MixedQuantizer
from lightning_gsq.saliency.choose import Choice


class UnsettledQuantizer(nn.Module):
    """Waits for the callback ``SaliencyThreshold``, which puts a :class:`MixedQuantizer` in its place before the fit.

    Args:
        name: The weight's name, for logs.
        matrix: The weight and the second moments of its inputs.
        build: Makes the quantizer from what was chosen.
    """

    def __init__(self, name: str, matrix: Matrix, build: Callable[[Choice], MixedQuantizer]) -> None:
        super().__init__()
        self.name, self.matrix, self.build = name, matrix, build

    def forward(self, seed: int) -> Tensor:
        """Never.

        Raises:
            ConfigurationError: always: nobody chose a salient part.
        """
        raise ConfigurationError(
            f"the salient part of {self.name} was never chosen: add lightning_gsq.callbacks.SaliencyThreshold to "
            "trainer.callbacks"
        )
