"""LightningModules of the phases."""

from lightning_gsq.modules.block import BlockQuantization, NonFiniteLossError
from lightning_gsq.modules.end_to_end import EndToEndOptions, EndToEndQuantization
from lightning_gsq.modules.model import ModelQuantization

__all__ = [
    "BlockQuantization",
    "EndToEndOptions",
    "EndToEndQuantization",
    "ModelQuantization",
    "NonFiniteLossError",
]
