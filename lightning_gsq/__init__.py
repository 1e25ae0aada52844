"""Quantize large language models to 1-4 bits a weight with Gumbel-Softmax, block by block, on PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_gsq.packed.registration import register_when_needed
from lightning_gsq.system.versions import own_version

if TYPE_CHECKING:
    from lightning_gsq.library import Quantized, quantize
    from lightning_gsq.loader import load
    from lightning_gsq.run.one_block import PreparedBlock, prepare_block
    from lightning_gsq.weights.scheme import QuantScheme

__version__ = own_version()

PUBLIC = {
    "PreparedBlock": "lightning_gsq.run.one_block",
    "QuantScheme": "lightning_gsq.weights.scheme",
    "Quantized": "lightning_gsq.library",
    "load": "lightning_gsq.loader",
    "prepare_block": "lightning_gsq.run.one_block",
    "quantize": "lightning_gsq.library",
}
"""Public names, and the modules that they come from; imported when they are asked for, because that takes seconds."""

__all__ = ["PreparedBlock", "QuantScheme", "Quantized", "__version__", "load", "prepare_block", "quantize"]

register_when_needed()


def __getattr__(name: str) -> Any:
    """What takes torch and transformers is imported when it is asked for."""
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
