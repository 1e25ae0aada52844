"""LightningModules of the phases."""

from lightning_gsq.modules.block import BlockQuantization, NonFiniteLossError
from lightning_gsq.modules.model import ModelQuantization

__all__ = ["BlockQuantization", "ModelQuantization", "NonFiniteLossError"]
