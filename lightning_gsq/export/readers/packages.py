"""Packages that read exported files, all optional: without one, a file is not checked, and the report says so."""

from __future__ import annotations

from importlib.util import find_spec

from lightning_gsq.export.contract import CheckReport

INSTALLATION = {
    "compressed-tensors": "pip install compressed-tensors",
    "gptqmodel": "pip install gptqmodel",
    "xllamacpp": "pip install xllamacpp",
}
"""How to install a package."""


def not_checked(package: str) -> CheckReport | None:
    """None if the package is there; otherwise the report that says that nothing was checked, and the way out."""
    if find_spec(package.replace("-", "_")) is not None:
        return None
    return CheckReport(package, note=f"NOT CHECKED: {package} is not installed ({INSTALLATION[package]})")
