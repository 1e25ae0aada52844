"""What a result was made with."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("lightning-gsq", "torch", "lightning", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}


def own_version() -> str:
    """The version of this package; 0.0.0 for a source tree that was never installed."""
    try:
        return version("lightning-gsq")
    except PackageNotFoundError:
        return "0.0.0"
