"""The formats by name: those of this package, those that a user registered, those that a class path names.

    @register
    class MyFormat(ExportFormat):
        name = "mine"

makes ``--format mine`` work wherever the module is imported; ``--format mymodule.MyFormat`` imports it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import ExportFormat
from lightning_gsq.weights.presets import is_preset

_FORMATS: dict[str, ExportFormat] = {}
Format = TypeVar("Format", bound=type[ExportFormat])


def register(format_class: Format) -> Format:
    """Makes a format known under its name; usable as a decorator.

    Raises:
        ConfigurationError: it is no format, or another class has its name.
    """
    if not (isinstance(format_class, type) and issubclass(format_class, ExportFormat)):
        raise ConfigurationError(f"format: {format_class!r} is no subclass of lightning_gsq.export.ExportFormat")
    present = _FORMATS.get(format_class.name)
    if present is not None and _path(type(present)) != _path(format_class):
        raise ConfigurationError(
            f"format: {_path(format_class)} and {_path(type(present))} are both called {format_class.name!r}"
        )
    _FORMATS[format_class.name] = format_class()
    return format_class


def all_formats() -> Mapping[str, ExportFormat]:
    """All registered formats by name, in the order of their registration."""
    return MappingProxyType(_FORMATS)


def format_of(name: str) -> ExportFormat:
    """The format of that name, in any case, or the one that a class path such as ``mymodule.MyFormat`` names.

    Raises:
        ConfigurationError: there is none.
    """
    if name.lower() in _FORMATS:
        return _FORMATS[name.lower()]
    module, _, attribute = name.rpartition(".")
    if module and all(part.isidentifier() for part in name.split(".")):
        return _imported(name, module, attribute)
    nearest = difflib.get_close_matches(name.lower(), _FORMATS, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    if is_preset(name.lower()):
        hint = f" ({name} is a scheme: fit --model.scheme {name.lower()})"
    raise ConfigurationError(
        f"there is no format {name!r}{hint}; choose from {', '.join(_FORMATS)}, or give the path of a class, "
        "such as mymodule.MyFormat"
    )


def _imported(name: str, module: str, attribute: str) -> ExportFormat:
    try:
        format_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"format: the class {name} cannot be imported: {error}") from error
    if not (isinstance(format_class, type) and issubclass(format_class, ExportFormat)):
        raise ConfigurationError(f"format: {name} is no subclass of lightning_gsq.export.ExportFormat")
    return _FORMATS.get(format_class.name) or format_class()


def _path(format_class: type) -> str:
    return f"{format_class.__module__}.{format_class.__qualname__}"
