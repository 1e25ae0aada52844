"""Quantize large language models to 1-4 bits a weight with Gumbel-Softmax, block by block, on PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lightning_gsq.packed.registration import register_when_needed

if TYPE_CHECKING:
    from lightning_gsq.packed.load import load

try:
    __version__ = version("lightning-gsq")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__", "load"]

register_when_needed()


def __getattr__(name: str) -> Any:
    """What takes torch and transformers is imported when it is asked for."""
    if name == "load":
        from lightning_gsq.packed.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
