"""What the parameters of a model are called in a GGUF file: gguf-py's map, with one parameter in several tensors.

transformers fuses the gates and the upward matrices of all experts into one parameter; a file has a tensor for each of
the two. Where a file fuses them too, it is one.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import gguf

from lightning_gsq.errors import ConfigurationError

GATE_AND_UP = "gate_up_proj"
SUFFIXES = (".weight", ".bias")
MOST_PREFIXES = 2
"""Leading parts of a name that gguf-py's map may lack: models differ in what wraps their blocks."""


class Names:
    """Names of one model's tensors.

    Args:
        architecture: llama.cpp's name of the architecture.
        blocks: Number of transformer blocks.

    Raises:
        ConfigurationError: the ``gguf`` package does not know the architecture.
    """

    def __init__(self, architecture: str, blocks: int) -> None:
        kinds = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
        if not kinds:
            raise ConfigurationError(
                f"format: gguf: the gguf package knows no architecture {architecture!r}; a newer one may: "
                "pip install -U gguf"
            )
        self.architecture = architecture
        self._map = gguf.get_tensor_name_map(kinds[0], blocks)

    def of(self, parameter: str, present: Collection[str] | None = None) -> list[str]:
        """The tensors that hold a parameter: one, or gates and upward matrices, in the order of the parameter's rows.

        Args:
            parameter: Its name in the model.
            present: The names in the file, if there is one already.

        Raises:
            ConfigurationError: it has no name in a file of this architecture.
        """
        name = self._one(parameter)
        if name is not None and (present is None or name in present):
            return [name]
        if parameter.removesuffix(".weight").endswith(GATE_AND_UP):
            halves = [self._one(parameter.replace(GATE_AND_UP, half)) for half in ("gate_proj", "up_proj")]
            if None not in halves:
                return [half for half in halves if half is not None]
        if name is not None:
            return [name]
        raise ConfigurationError(
            f"format: gguf has no name for the parameter {parameter} in a file of the {self.architecture} "
            "architecture; export to native or dequantized"
        )

    @functools.cache  # noqa: B019 - a few thousand names, as long as the map that gives them
    def _one(self, parameter: str) -> str | None:
        parts = parameter.split(".")
        for first in range(min(MOST_PREFIXES, len(parts) - 1) + 1):
            name: str | None = self._map.get_name(".".join(parts[first:]), try_suffixes=SUFFIXES)
            if name is not None:
                return name if name.endswith(SUFFIXES) else f"{name}.weight"
        return None
