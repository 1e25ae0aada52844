"""Classes that options take by a short name, in any case: ``gptq`` for ``lightning_gsq.quantizers.GPTQ``."""

from __future__ import annotations

import inspect
from types import ModuleType

import torch
from lightning.pytorch import Callback

from lightning_gsq import callbacks, data, quantizers, training
from lightning_gsq.data import TextSource
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import FromFile, WarmStart
from lightning_gsq.quantizers.from_file import ROUNDS_NOTHING

MOVED = {
    "lightning_gsq.optim.": "lightning_gsq.training.",
    "lightning_gsq.modules.": "lightning_gsq.training.",
    "lightning_gsq.sage.DualMode": "lightning_gsq.quantizers.DualMode",
    "lightning_gsq.sage.": "lightning_gsq.saliency.",
}
"""Where classes went that have moved, by the beginning of their paths."""


def _of_kind(base: type, *modules: ModuleType) -> dict[str, str]:
    """Paths of the classes of a kind that modules make public, by name; of two with one name, the first."""
    paths: dict[str, str] = {}
    for module in modules:
        for name in getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]:
            value = getattr(module, name)
            if (
                inspect.isclass(value)
                and issubclass(value, base)
                and not inspect.isabstract(value)
                and value is not base
            ):
                paths.setdefault(name, f"{module.__name__}.{name}")
    return paths


WARM_STARTS = _of_kind(WarmStart, quantizers)
SOURCES = _of_kind(TextSource, data)
OPTIMIZERS = _of_kind(torch.optim.Optimizer, torch.optim, training)
CALLBACKS = _of_kind(Callback, callbacks)
OPTIONS = {
    "model.warm_start": WARM_STARTS,
    "model.warm_start.rounding": {name: path for name, path in WARM_STARTS.items() if name != FromFile.__name__},
    "model.optimizer": OPTIMIZERS,
    "end_to_end.optimizer": OPTIMIZERS,
    "data.source": SOURCES,
    "evaluation.source": SOURCES,
    "trainer.callbacks": CALLBACKS,
}
"""The classes that an option takes, path by name."""


def class_names(option: str) -> list[str]:
    """Names of the classes that an option takes; none if it takes no class."""
    return list(OPTIONS.get(option, {}))


def class_path(option: str, value: str) -> str:
    """The path of a class given by its short name in any case; anything else as it is.

    Raises:
        ConfigurationError: it is none that can stand there, though others of its kind can.
    """
    if option == "model.warm_start.rounding" and value.rpartition(".")[2].lower() == FromFile.__name__.lower():
        raise ConfigurationError(ROUNDS_NOTHING)  # else its own arguments would be asked for first
    by_lower = {name.lower(): path for name, path in OPTIONS.get(option, {}).items()}
    return by_lower.get(value.lower(), value)


def refuse_moved(value: str) -> None:
    """Names the new path of a class that has moved.

    Raises:
        ConfigurationError: it has.
    """
    for old, new in MOVED.items():
        if value.startswith(old):
            raise ConfigurationError(f"class_path: {value} is now {new}{value.removeprefix(old)}; write that")
