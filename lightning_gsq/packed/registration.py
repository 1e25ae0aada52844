"""Tells transformers of the native format, without importing transformers for it.

Whoever loads a model imports ``transformers.modeling_utils``; what reads the format is imported right after that. So
``import lightning_gsq`` costs nothing, and :func:`lightning_gsq.load` or transformers' own ``from_pretrained`` find
the format all the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.modeling_utils"
READER = "lightning_gsq.packed.load"


def register_when_needed() -> None:
    """Imports the reader of the format as soon as transformers can load models."""
    if AWAITED in sys.modules:
        importlib.import_module(READER)
    elif not any(isinstance(finder, _Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registration())


class _Registration(MetaPathFinder):
    """Finds nothing itself; once the awaited module is there, it imports the reader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(READER)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
