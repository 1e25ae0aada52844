"""Packages that read exported files, all optional: without one, a file is not checked, and the report says so."""

from __future__ import annotations

from importlib.util import find_spec

from lightning_gsq.export.contract import CheckReport

MODULES = {"mlx-lm": "mlx_lm"}
"""Modules that are not called as their package."""
INSTALLATION = {
    "compressed-tensors": "pip install compressed-tensors",
    "gptqmodel": "pip install gptqmodel",
    "mlx-lm": 'pip install "mlx[cpu]" mlx-lm',
    "xllamacpp": "pip install xllamacpp",
}
"""How to install a package."""


def missing(package: str) -> str:
    """Empty if the package is there; otherwise what that means, and the way out."""
    if find_spec(MODULES.get(package, package.replace("-", "_"))) is not None:
        return ""
    return f"NOT CHECKED with {package}, which is not installed ({INSTALLATION[package]})"


def not_checked(package: str) -> CheckReport | None:
    """None if the package is there; otherwise the report that says that nothing was checked."""
    note = missing(package)
    return CheckReport(package, note=note, checked=False) if note else None
