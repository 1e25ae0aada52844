"""Quantize large language models to 1-4 bits a weight with Gumbel-Softmax, block by block, on PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

from lightning_gsq.packed.load import load

try:
    __version__ = version("lightning-gsq")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__", "load"]
